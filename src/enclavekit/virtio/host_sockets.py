# SPDX-License-Identifier: Apache-2.0
"""The host's side of vsock as Unix sockets (docs/vsock.md): how programs here and an enclave reach each other.

Into the enclave: connect to ``vsock.sock``, write ``CONNECT <port>\\n``, read ``OK <host port>\\n``. Out of it: what
the enclave dials at the parent's port P is ``vsock.sock_<P>`` in its own directory, then ``<P>.sock`` in the directory
that all enclaves share; there the caller is told apart by the name that our end is bound to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

from enclavekit.virtio.loop import READ, Loop
from enclavekit.virtio.vsock import VsockDevice

HEARTBEAT_PORT = 9000
HEARTBEAT = b"\xb7"
MAX_LINE = 32
MAX_WAITING = 64
"""Clients of vsock.sock that have not said yet what they want."""
LINE_TIMEOUT_S = 10.0
MAX_SUN_PATH = 107


class ParentRoute:
    """CID 3 (and 2): host sockets, and the heartbeat where nobody else answers it."""

    def __init__(
        self,
        loop: Loop,
        directory: Path,
        parent_directory: Path | None,
        enclave_id: str,
        on_heartbeat: Callable[[], None] | None,
    ) -> None:
        self._loop = loop
        self._directory = directory
        self._parent_directory = parent_directory
        self._enclave_id = enclave_id
        self._on_heartbeat = on_heartbeat

    def connect(self, port: int, guest_cid: int, guest_port: int) -> socket.socket | None:
        """A socket to whoever listens for ``port``."""
        found = connect_unix(self._directory, f"vsock.sock_{port}")
        if found is None and self._parent_directory is not None:
            name = f"\0enclavekit/{self._enclave_id}/{guest_cid}:{guest_port}"
            found = connect_unix(self._parent_directory, f"{port}.sock", name)
        if found is None and port == HEARTBEAT_PORT:
            return self._heartbeat()
        return found

    def _heartbeat(self) -> socket.socket:
        """Answers one byte with the same byte, and says that it did."""
        guest, ours = socket.socketpair()
        guest.setblocking(False)
        ours.setblocking(False)

        def heard(events: int) -> None:
            del events
            try:
                byte = ours.recv(1)
                if byte == HEARTBEAT:
                    ours.send(byte)
                    if self._on_heartbeat is not None:
                        self._on_heartbeat()
            except OSError:
                pass
            self._loop.watch(ours, 0, heard)
            ours.close()

        self._loop.watch(ours, READ, heard)
        return guest


class ConnectListener:
    """``vsock.sock``: host programs dial into the enclave."""

    def __init__(self, loop: Loop, device: VsockDevice, directory: Path) -> None:
        self._loop = loop
        self._device = device
        self._path = directory / "vsock.sock"
        self._listener = listen_unix(directory, "vsock.sock")
        self._waiting: set[socket.socket] = set()
        loop.watch(self._listener, READ, self._accept)

    def close(self) -> None:
        """After the loop has ended."""
        self._listener.close()
        for client in self._waiting:
            client.close()
        self._path.unlink(missing_ok=True)

    def _accept(self, events: int) -> None:
        del events
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        if len(self._waiting) >= MAX_WAITING:
            client.close()
            return
        client.setblocking(False)
        self._waiting.add(client)
        self._loop.watch(client, READ, lambda _: self._line(client))
        self._loop.after(LINE_TIMEOUT_S, lambda: self._forget(client))

    def _forget(self, client: socket.socket) -> None:
        if client in self._waiting:
            self._waiting.discard(client)
            self._loop.watch(client, 0, lambda _: None)
            client.close()

    def _line(self, client: socket.socket) -> None:
        """Take the line and not a byte more: a client may have sent data behind it already."""
        try:
            seen = client.recv(MAX_LINE, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            seen = b""
        line, newline, _ = seen.partition(b"\n")
        if not newline and seen and len(seen) < MAX_LINE:
            # Part of a line: wait for more than what is there.
            self._loop.watch(client, 0, lambda _: None)
            self._loop.after(0.01, lambda: self._again(client))
            return
        port = parse_connect(line) if newline else None
        if port is None:
            self._forget(client)
            return
        client.recv(len(line) + 1)
        self._waiting.discard(client)
        self._loop.watch(client, 0, lambda _: None)
        self._device.connect(
            port,
            client,
            on_open=lambda host_port: _send_quietly(client, b"OK %d\n" % host_port),
            on_refused=lambda: None,
        )

    def _again(self, client: socket.socket) -> None:
        if client in self._waiting:
            self._loop.watch(client, READ, lambda _: self._line(client))


def _send_quietly(client: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # gone: the connection's next read tells
        client.send(data, socket.MSG_NOSIGNAL)


def parse_connect(line: bytes) -> int | None:
    """The port of ``CONNECT <port>``; None for anything else."""
    word, _, number = line.strip(b"\r").partition(b" ")
    if word.upper() != b"CONNECT" or not number.isdigit() or len(number) > 10 or int(number) >= 0xFFFF_FFFF:
        return None
    return int(number)


def connect_unix(directory: Path, name: str, own_name: str | None = None) -> socket.socket | None:
    """A non-blocking connection to ``directory/name``; None where nobody listens, or nobody has room."""
    if not os.path.lexists(directory / name):
        return None
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if own_name is not None:
            with contextlib.suppress(OSError):  # taken: the listener is told nothing, which is no harm
                made.bind(own_name)
        with _address(directory, name) as address:
            made.connect(address)
    except OSError:
        made.close()
        return None
    return made


def listen_unix(directory: Path, name: str) -> socket.socket:
    """A non-blocking listener at ``directory/name``; raises ``OSError``."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with contextlib.suppress(FileNotFoundError):
            (directory / name).unlink()
        with _address(directory, name) as address:
            made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        if error.errno == errno.ENAMETOOLONG:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(directory / name)) from error
        raise
    return made


@contextlib.contextmanager
def _address(directory: Path, name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """A path that fits into a socket address: a long one goes through the directory's descriptor."""
    path = os.fspath(directory / name)
    if len(os.fsencode(path)) <= MAX_SUN_PATH:
        yield path
        return
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
