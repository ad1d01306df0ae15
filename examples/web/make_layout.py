#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make a container image of the web service, as an OCI layout: ``make_layout.py DIRECTORY``.

Debian's root file system by mmdebstrap, bottle by pip, put together by umoci: no daemon. DIRECTORY must not exist.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("/etc/apt/sources.list", "/etc/apt/sources.list.d/debian.sources")
PACKAGES = "python3-minimal,libpython3-stdlib"


def main() -> None:
    """The program."""
    if len(sys.argv) != 2:
        sys.exit("usage: make_layout.py DIRECTORY")
    make_layout(Path(sys.argv[1]))


def make_layout(layout: Path) -> None:
    """CalledProcessError when one of the programs fails."""
    codename = run("sh", "-c", '. /etc/os-release; echo "$VERSION_CODENAME"').strip()
    with tempfile.TemporaryDirectory(prefix="enclavekit-web-") as directory:
        work = Path(directory)
        base, application = work / "base.tar", work / "application.tar"
        sources = [name for name in SOURCES if Path(name).is_file()]
        run("mmdebstrap", "--quiet", "--variant=essential", f"--include={PACKAGES}", codename, base, *sources)
        packages = work / "packages"
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", packages, "bottle==0.13.4")
        with tarfile.open(application, "w") as tar:
            tar.add(packages, "srv/packages", filter=as_root)
            tar.add(HERE / "app.py", "srv/app.py", filter=as_root)
        image = f"{layout}:latest"
        run("umoci", "init", "--layout", layout)
        run("umoci", "new", "--image", image)
        run("umoci", "raw", "add-layer", "--image", image, base)
        run("umoci", "raw", "add-layer", "--image", image, application)
        run(
            "umoci", "config", "--image", image, "--config.entrypoint=python3", "--config.entrypoint=-u",
            "--config.cmd=/srv/app.py", "--config.env=PYTHONPATH=/srv/packages", "--config.user=www-data",
            "--config.workingdir=/srv",
        )  # fmt: skip


def as_root(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Whoever made it here, root owns it there, and everybody may read it."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mode = 0o755 if info.isdir() else 0o644
    return info


def run(*words: str | Path) -> str:
    """What it says on stdout."""
    return subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
