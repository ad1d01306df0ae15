# SPDX-License-Identifier: Apache-2.0
"""What the application runs as: the builder's words over the container image's own, as docker takes them together.

Source: OCI image specification, config.md; docker run. The program is ENTRYPOINT and then CMD; a command given takes
the place of CMD, and an entrypoint given that of both. Variables are added to the image's; a later one replaces one.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from enclavekit.codec.init_config import DEFAULT_STOP_SIGNAL, InitConfig
from enclavekit.errors import BuildError, FormatError, UsageError
from enclavekit.image.oci import ImageConfig
from enclavekit.image.tree import Tree
from enclavekit.image.users import User, find_user


@dataclass(frozen=True, slots=True)
class Application:
    """What the builder says; None and nothing leave it to the image. ``stop_signal`` is a name or a number.

    ``launch`` names the values that may be given at each launch; ``attest`` lets the host ask for documents.
    """

    command: Sequence[str] = ()
    entrypoint: Sequence[str] | None = None
    environment: Sequence[str] = ()
    workdir: str | None = None
    user: str | None = None
    stop_signal: str | None = None
    logs: bool = False
    launch: Sequence[str] = ()
    attest: bool = False


def init_config(application: Application, image: ImageConfig | None, tree: Tree) -> InitConfig:
    """Together with what the container image says; names are looked up in its files.

    UsageError when there is nothing to run, BuildError for what init cannot be told, SourceError for unknown users.
    """
    found = image or ImageConfig("linux", "", ())
    arguments = _arguments(application, found)
    if not arguments:
        raise UsageError(
            "no command: the image would have nothing to run", hint="put it last: ... -- /bin/app argument"
        )
    user_name = found.user if application.user is None else application.user
    user = find_user(tree, user_name) if user_name else User()
    # The last one of a name counts, as in a shell.
    environment = {item.partition("=")[0]: item for item in (*found.environment, *application.environment)}
    # An image's own may be relative, and is then below the root.
    workdir = f"/{found.workdir.removeprefix('/')}" if application.workdir is None else application.workdir
    stop_signal = found.stop_signal if application.stop_signal is None else application.stop_signal
    try:
        return InitConfig(
            arguments=tuple(text_bytes(argument) for argument in arguments),
            environment=tuple(text_bytes(item) for item in environment.values()),
            workdir=text_bytes(workdir),
            uid=user.uid,
            gid=user.gid,
            groups=user.groups,
            logs=application.logs,
            stop_signal=signal_number(stop_signal),
            launch=tuple(text_bytes(name) for name in application.launch),
            attest=application.attest,
        )
    except FormatError as error:
        raise BuildError(error.message) from error


def signal_number(text: str) -> int:
    """``SIGTERM``, ``TERM`` or ``15``; nothing is SIGTERM. BuildError for none that there is."""
    if not text:
        return DEFAULT_STOP_SIGNAL
    if text.isascii() and text.isdigit() and len(text) < 4:
        return int(text)
    name = text.upper() if text.upper().startswith("SIG") else f"SIG{text.upper()}"
    base, plus, offset = name.partition("+")
    if base == "SIGRTMIN" and plus and offset.isascii() and offset.isdigit() and int(offset[:3]) <= 30:
        return 34 + int(offset)
    try:
        return int(signal.Signals[name])
    except KeyError as error:
        raise BuildError(f"stop signal {text[:32]!r}: expected a name as SIGTERM, or a number") from error


def text_bytes(text: str) -> bytes:
    """As it came from the command line or a file name."""
    return text.encode("utf-8", "surrogateescape")


def _arguments(application: Application, image: ImageConfig) -> tuple[str, ...]:
    if application.entrypoint is not None:
        return (*application.entrypoint, *application.command)
    return (*image.entrypoint, *(application.command or image.command))
