# SPDX-License-Identifier: Apache-2.0
"""Blocking sockets to and from enclaves. Local enclaves first; where there is none, what the system's vsock knows."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from enclavekit.enclave.directory import PARENT, find, prepare, running
from enclavekit.environment import runtime_directory
from enclavekit.errors import EnclaveConnectionError, EnclaveRefusedError, FileError, NoEnclaveError
from enclavekit.linux.locks import try_lock
from enclavekit.virtio.host_sockets import MAX_PORT, SOCKET_NAME, socket_path

DRIVER = Path("/dev/nitro_enclaves")
BACKLOG = 128
TIMEOUT_S = 10.0
_MAX_ANSWER = 32
_CALLER = re.compile(rb"\0enclavekit/([0-9a-f]{8})/([0-9]{1,10}):([0-9]{1,10})")
_ANSWER = re.compile(rb"OK [0-9]{1,10}\n")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who dialled. With local enclaves a courtesy and no proof: any process here can say so, and 0 means not said."""

    cid: int
    port: int
    enclave_id: str = ""


def on_parent() -> bool:
    """Whether this is a parent of real enclaves, whose vsock is the kernel's."""
    return DRIVER.exists() and hasattr(socket, "AF_VSOCK")


def connect(
    enclave: str | int, port: int, *, timeout_s: float | None = TIMEOUT_S, runtime: Path | None = None
) -> socket.socket:
    """A connected stream socket, which blocks. ``enclave`` is a name or id, or a CID.

    Errors: NoEnclaveError, EnclaveRefusedError, EnclaveConnectionError (no answer within ``timeout_s``).
    """
    _check_port(port)
    if isinstance(enclave, int) and on_parent():
        return _connect_kernel(enclave, port, timeout_s)
    directory = runtime or runtime_directory()
    path = find(directory, enclave)[0] if isinstance(enclave, str) else _by_cid(directory, enclave)
    where = f"port {port} of enclave {enclave}"
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout_s)
        with socket_path(path, SOCKET_NAME) as place:
            sock.connect(place)
        sock.sendall(b"CONNECT %d\n" % port)
        answer = b""
        while not answer.endswith(b"\n"):
            part = sock.recv(1)  # what follows the line is for the caller
            if not part:
                raise EnclaveRefusedError(f"{where}: connection refused", hint="does a program listen there?")
            answer += part
            if len(answer) > _MAX_ANSWER:
                break
        if not _ANSWER.fullmatch(answer):
            raise EnclaveConnectionError(f"{where}: answered {answer!r}, expected OK and a port")
        sock.settimeout(None)
    except BaseException as error:
        sock.close()
        if isinstance(error, TimeoutError):
            raise EnclaveConnectionError(f"{where}: no answer within {timeout_s:g} s") from error
        if isinstance(error, OSError):
            raise EnclaveConnectionError(f"{where}: {(error.strerror or str(error)).lower()}") from error
        raise
    return sock


def listen(port: int, *, backlog: int = BACKLOG, runtime: Path | None = None) -> Listener:
    """Listen at a port of the parent, for all enclaves, also those that come later. Errors: FileError."""
    _check_port(port)
    if on_parent():
        sock = _kernel_socket()
        try:
            sock.bind((socket.VMADDR_CID_ANY, port))
            sock.listen(backlog)
        except OSError as error:
            sock.close()
            raise FileError.of(error, f"vsock port {port}", "listen on") from error
        return Listener(sock)
    directory = runtime or runtime_directory()
    prepare(directory)
    return _listen_here(directory / PARENT, port, backlog)


class Listener:
    """A listening socket; close it, or use it in a ``with``."""

    def __init__(self, sock: socket.socket, path: Path | None = None, lock: int | None = None) -> None:
        self._socket = sock
        self._path = path
        self._lock = lock

    def accept(self) -> tuple[socket.socket, Caller]:
        """The next connection, which blocks, and who dialled."""
        connection, name = self._socket.accept()
        return connection, caller_of(name)

    def fileno(self) -> int:
        """For select and its like."""
        return self._socket.fileno()

    @property
    def socket(self) -> socket.socket:
        """The socket itself."""
        return self._socket

    def settimeout(self, timeout_s: float | None) -> None:
        """Of ``accept``; TimeoutError then."""
        self._socket.settimeout(timeout_s)

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()
            self._path = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def caller_of(name: object) -> Caller:
    """From what ``accept`` says of the other side."""
    if isinstance(name, tuple):
        cid, port = name
        return Caller(cid, port)
    match = _CALLER.fullmatch(name if isinstance(name, bytes) else b"")
    return Caller(int(match[2]), int(match[3]), match[1].decode()) if match else Caller(0, 0)


def _listen_here(directory: Path, port: int, backlog: int) -> Listener:
    """A socket of a process that died is replaced; one of a living process is not."""
    name = f"{port}.sock"
    sock = socket.socket(socket.AF_UNIX)
    lock = None
    try:
        lock = try_lock(directory / f"{port}.lock")
        if lock is None:
            raise FileError(f"cannot listen on port {port}: another program does")
        (directory / name).unlink(missing_ok=True)
        with socket_path(directory, name) as place:
            sock.bind(place)
        sock.listen(backlog)
    except BaseException as error:
        sock.close()
        if lock is not None:
            os.close(lock)
        if isinstance(error, OSError):
            raise FileError.of(error, directory / name, "listen on") from error
        raise
    return Listener(sock, directory / name, lock)


def _by_cid(directory: Path, cid: int) -> Path:
    for state in running(directory):
        if state.get("cid") == cid:
            return directory / str(state["id"])
    raise NoEnclaveError(f"CID {cid}: no enclave has it", hint="enclave ps shows all that run")


def _connect_kernel(cid: int, port: int, timeout_s: float | None) -> socket.socket:
    sock = _kernel_socket()
    try:
        sock.settimeout(timeout_s)
        sock.connect((cid, port))
        sock.settimeout(None)
    except OSError as error:
        sock.close()
        where = f"port {port} of CID {cid}"
        if isinstance(error, ConnectionResetError | ConnectionRefusedError):
            raise EnclaveRefusedError(f"{where}: connection refused", hint="does a program listen there?") from error
        raise EnclaveConnectionError(f"{where}: {(error.strerror or str(error)).lower()}") from error
    return sock


def _kernel_socket() -> socket.socket:
    return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)


def _check_port(port: int) -> None:
    if not 0 <= port <= MAX_PORT:
        raise ValueError(f"port {port} is not within 0 to {MAX_PORT}")
