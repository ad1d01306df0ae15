# SPDX-License-Identifier: Apache-2.0
"""Container images from a directory with a Dockerfile, by way of buildah or docker, whichever is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from enclavekit.errors import BuildError, MissingError

PROGRAMS = ("buildah", "docker")
ARCHIVE = "image.tar"


def build_dockerfile(directory: Path, tag: str, *, path: str, scratch: Path) -> str:
    """Build it, called ``tag``; the source to build an enclave image of. What the program says goes to stderr.

    ``path`` is a PATH; an archive, if there is one, is made in ``scratch``. Errors: MissingError, BuildError.
    """
    if not directory.is_dir():
        raise BuildError(f"{directory}: expected a directory with a Dockerfile")
    programs = {name: found for name in PROGRAMS if (found := shutil.which(name, path=path))}
    if "buildah" in programs:
        _run(programs["buildah"], "build", "--tag", tag, "--", str(directory))
        archive = scratch / ARCHIVE
        _run(programs["buildah"], "push", tag, f"oci-archive:{archive}")
        return f"oci-archive:{archive}"
    if "docker" in programs:
        _run(programs["docker"], "build", "--tag", tag, "--", str(directory))
        return f"docker-daemon:{tag}"
    raise MissingError(
        "neither buildah nor docker is installed, which a Dockerfile needs",
        hint="install buildah, which needs no daemon; or build the image elsewhere and name it",
    )


def _run(*command: str) -> None:
    try:
        # Its words are progress: they belong to stderr.
        done = subprocess.run(["/bin/sh", "-c", 'exec "$@" >&2', "sh", *command], stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]}: cannot be run: {(error.strerror or str(error)).lower()}") from error
    if done.returncode:
        raise BuildError(f"{Path(command[0]).name} {command[1]}: failed with status {done.returncode}")
