# SPDX-License-Identifier: Apache-2.0
"""Images of a docker daemon, over its socket: ``docker save`` without the program. Podman's socket speaks the same.

Source: Docker Engine API, GET /images/{name}/get, a tar as ``docker-archive:`` takes it.
"""

from __future__ import annotations

import http.client
import socket
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from enclavekit.eif import CHUNK_SIZE, Arch
from enclavekit.errors import FileError, NoDockerError, NoImageError, SourceError
from enclavekit.image.container import ContainerImage
from enclavekit.image.layouts import open_docker_archive

TIMEOUT_S = 300.0
"""Until the daemon's first word, and between any two."""
MAX_ARCHIVE_SIZE = 64 << 30
MAX_MESSAGE_SIZE = 1 << 16


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))


def open_daemon(
    name: str, arch: Arch | None, sockets: Sequence[Path], files: ExitStack, *, scratch: Path | None
) -> ContainerImage:
    """``docker-daemon:NAME[:TAG]``, from the first socket that answers, by way of an unnamed file in ``scratch``.

    Errors: NoDockerError, NoImageError, SourceError, FileError.
    """
    asked = name if "@" in name or ":" in name.rpartition("/")[2] or name.startswith("sha256:") else f"{name}:latest"
    where = f"docker daemon: {asked}"
    try:
        archive: BinaryIO = files.enter_context(tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115
    except OSError as error:
        raise FileError.of(error, "temporary file", "write") from error
    with closing(_connect(sockets)) as connection:
        try:
            connection.request("GET", f"/images/{quote(asked, safe='')}/get")
            with closing(connection.getresponse()) as answer:
                _check(answer, asked, where)
                _save(answer, archive, where)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise SourceError(f"{where}: {reason.lower()}") from error
    # The one image in it, whatever it is called there.
    return open_docker_archive(
        Path(f"/proc/self/fd/{archive.fileno()}"), None, arch, files, scratch=scratch, name=where
    )


def _connect(sockets: Sequence[Path]) -> _Connection:
    reasons = []
    for path in sockets:
        connection = _Connection(path)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            reasons.append(f"{path}: {(error.strerror or str(error)).lower()}")
        else:
            return connection
    raise NoDockerError(
        f"no docker daemon ({'; '.join(reasons) or 'no socket'})",
        hint="docker://NAME fetches from the registry without one",
    )


def _check(answer: http.client.HTTPResponse, name: str, where: str) -> None:
    if answer.status == http.client.NOT_FOUND:
        raise NoImageError(f"{where}: no such image", hint=f"docker pull {name}, or docker://{name}")
    if answer.status != http.client.OK:
        said = answer.read(MAX_MESSAGE_SIZE)[:200].decode("utf-8", "replace")
        raise SourceError(f"{where}: status {answer.status}: {' '.join(said.split())}")


def _save(answer: http.client.HTTPResponse, archive: BinaryIO, where: str) -> None:
    size = 0
    while chunk := answer.read(CHUNK_SIZE):
        size += len(chunk)
        if size > MAX_ARCHIVE_SIZE:
            raise SourceError(f"{where}: more than {MAX_ARCHIVE_SIZE} bytes")
        try:
            archive.write(chunk)
        except OSError as error:
            raise FileError.of(error, "temporary file", "write") from error
    if answer.length:
        raise SourceError(f"{where}: ended {answer.length} bytes too early")
    archive.flush()
