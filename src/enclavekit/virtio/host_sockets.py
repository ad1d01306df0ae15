# SPDX-License-Identifier: Apache-2.0
"""How host programs and an enclave reach each other: Unix sockets in the enclave's directory (docs/vsock.md).

``run --publish`` and ``--listen`` add TCP ports, and other paths.

``vsock.sock`` takes ``CONNECT <port>\\n`` and answers ``OK <host port>\\n``, a convention of Firecracker's that other
monitors share. What the enclave dials goes to ``vsock.sock_<port>``, else to ``<port>.sock`` in a directory that all
enclaves share, else to a service of ours.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from enclavekit.errors import FileError
from enclavekit.virtio.loop import Loop
from enclavekit.virtio.streams import SocketStream
from enclavekit.virtio.vsock import VsockDevice
from enclavekit.virtio.vsock_host import Outcome, Stream
from enclavekit.virtio.vsock_packet import Address

SOCKET_NAME = "vsock.sock"
MAX_PATH = 107
"""Bytes of a Unix socket's path (linux: sun_path in include/uapi/linux/un.h, less the NUL)."""

CONNECT_LINE = re.compile(rb"CONNECT ([0-9]{1,10})\r?\n", re.IGNORECASE)
MAX_LINE = 32
CONNECT_TIMEOUT_S = 2.0
MAX_PORT = 0xFFFFFFFE
"""The last number is VMADDR_PORT_ANY."""

RETRY_ACCEPT_S = 0.1
BACKLOG = 1024


@contextmanager
def socket_path(directory: Path, name: str) -> Iterator[str]:
    """A path to bind or connect by, short enough: through /proc/self/fd where the real one is too long."""
    path = f"{directory}/{name}"  # each connection passes here, and pathlib takes its time
    if len(os.fsencode(path)) <= MAX_PATH:
        yield path
        return
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class HostAddress:
    """A Unix socket's path, or a TCP host and port."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    def connect(self) -> socket.socket | None:
        """Non-blocking; None when nobody listens."""
        sock: socket.socket | None = None
        try:
            if self.path is not None:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                with socket_path(self.path.parent, self.path.name) as path:
                    sock.connect(path)
            else:
                family, kind, protocol, _, address = socket.getaddrinfo(
                    self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
                )[0]
                sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with suppress(BlockingIOError):  # it goes on by itself; what is written waits for it
                    sock.connect(address)
        except OSError:
            if sock is not None:
                sock.close()
            return None
        return sock

    def listen(self) -> socket.socket:
        """Listening on a TCP port, non-blocking. Raises ``FileError``."""
        where = f"{self.host}:{self.port}"
        try:
            family, kind, protocol, _, name = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        except OSError as error:
            raise FileError.of(error, where, "listen on") from error
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(name)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise FileError.of(error, where, "listen on") from error
        return listener


class ParentRoute:
    """CID 3, and 2: dials host sockets, then ``services`` by port."""

    def __init__(
        self,
        loop: Loop,
        *,
        enclave_id: str,
        directory: Path,
        parent_directory: Path | None,
        services: Mapping[int, Callable[[], Stream]],
        listen: Mapping[int, HostAddress] | None = None,
    ) -> None:
        self._listen = listen or {}
        self._loop = loop
        self._enclave_id = enclave_id
        self._directory = directory
        self._parent_directory = parent_directory
        self._services = services

    def dial(self, source: Address, port: int) -> Stream | None:
        """The first that accepts."""
        if port in self._listen:
            sock = self._listen[port].connect()
            return SocketStream(self._loop, sock) if sock is not None else None
        sock = self._connect(self._directory, f"{SOCKET_NAME}_{port}", None)
        if sock is None and self._parent_directory is not None:
            sock = self._connect(self._parent_directory, f"{port}.sock", source)
        if sock is not None:
            return SocketStream(self._loop, sock)
        service = self._services.get(port)
        return service() if service is not None else None

    def _connect(self, directory: Path, name: str, source: Address | None) -> socket.socket | None:
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:
            return None
        try:
            if source is not None:
                self._introduce(sock, source)
            with socket_path(directory, name) as path:
                sock.connect(path)
        except OSError:
            sock.close()
            return None
        return sock

    def _introduce(self, sock: socket.socket, source: Address) -> None:
        """Let ``accept`` name the caller. The name of a connection that still closes may be taken: then go unnamed."""
        try:
            sock.bind(f"\0enclavekit/{self._enclave_id}/{source.cid}:{source.port}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise


class Listener:
    """``vsock.sock``: host programs that want into the enclave."""

    def __init__(self, loop: Loop, device: VsockDevice, directory: Path) -> None:
        self._loop = loop
        self._device = device
        self._path = directory / SOCKET_NAME
        self._waiting: set[socket.socket] = set()
        """Clients that have not said yet where to."""
        self._retrying = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._path.unlink(missing_ok=True)
            with socket_path(directory, SOCKET_NAME) as path:
                self._socket.bind(path)
            self._socket.listen(BACKLOG)
        except OSError as error:
            self._socket.close()
            raise FileError.of(error, self._path, "listen on") from error
        loop.watch(self._socket.fileno(), self._accept)

    def _accept(self, events: int = 0) -> None:
        del events
        while self._socket.fileno() >= 0:
            try:
                client, _ = self._socket.accept()
            except BlockingIOError:
                return
            except OSError:  # no file descriptors, no memory: the client waits as well
                if not self._retrying:
                    self._retrying = True
                    self._loop.call_later(RETRY_ACCEPT_S, self._retry)
                return
            client.setblocking(False)
            self._waiting.add(client)
            self._loop.watch(client.fileno(), partial(self._read_line, client), select.EPOLLIN | select.EPOLLRDHUP)

    def _retry(self) -> None:
        self._retrying = False
        self._accept()

    def _read_line(self, client: socket.socket, events: int) -> None:
        """Look until there is a whole line, then take just that: what follows is for the enclave."""
        try:
            seen = client.recv(MAX_LINE, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            seen = b""
        line = CONNECT_LINE.match(seen)
        port = int(line[1]) if line else MAX_PORT + 1
        if line is None and seen and len(seen) < MAX_LINE and b"\n" not in seen and not events & select.EPOLLHUP:
            return
        self._waiting.remove(client)
        if line is None or port > MAX_PORT:
            self._loop.retire(client)
            return
        client.recv(line.end())
        self._loop.forget(client.fileno())
        self._device.open(port, SocketStream(self._loop, client), CONNECT_TIMEOUT_S, partial(self._answer, client))

    def _answer(self, client: socket.socket, outcome: Outcome, host_port: int) -> None:
        if outcome is Outcome.ACCEPTED:
            with suppress(OSError):  # it is gone; the stream's end will say so
                client.send(b"OK %d\n" % host_port)

    def close(self) -> None:
        """Take the socket away."""
        for sock in (*self._waiting, self._socket):
            self._loop.retire(sock)
        self._waiting.clear()
        with suppress(OSError):  # the directory may be gone
            self._path.unlink()


class Published:
    """A TCP port of the host whose connections go to a port of the enclave."""

    def __init__(self, loop: Loop, device: VsockDevice, address: HostAddress, port: int) -> None:
        self._loop, self._device, self._port = loop, device, port
        self._retrying = False
        self._socket = address.listen()
        loop.watch(self._socket.fileno(), self._accept)

    def _accept(self, events: int = 0) -> None:
        del events
        self._retrying = False
        while self._socket.fileno() >= 0:
            try:
                client, _ = self._socket.accept()
            except BlockingIOError:
                return
            except OSError:  # no file descriptors, no memory: the client waits as well
                if not self._retrying:
                    self._retrying = True
                    self._loop.call_later(RETRY_ACCEPT_S, self._accept)
                return
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Refused by the enclave, it is closed.
            self._device.open(
                self._port, SocketStream(self._loop, client), CONNECT_TIMEOUT_S, lambda outcome, port: None
            )

    def close(self) -> None:
        """Listen no more."""
        self._loop.retire(self._socket)
