# SPDX-License-Identifier: Apache-2.0
"""Host ends of vsock connections: a socket, and the heartbeat's answer without one."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from enclavekit.virtio.loop import Loop

READABLE = select.EPOLLIN | select.EPOLLRDHUP

HEARTBEAT_PORT = 9000
HEARTBEAT = 0xB7


class SocketStream:
    """A connected stream socket, from now on this object's own (see ``vsock.Stream``)."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._loop = loop
        self._socket = sock
        self._full = False
        """The last send did not take all: wait for room. Else every read of the other side would wake us."""

    def attach(self, on_event: Callable[[int], None]) -> None:
        """Events of the socket, edges."""
        self._loop.watch(self._socket.fileno(), on_event, READABLE)

    def receive(self, buffers: Sequence[memoryview]) -> int | None:
        """An error ends the stream as its end does."""
        try:
            if len(buffers) == 1:
                return self._socket.recv_into(buffers[0])
            return self._socket.recvmsg_into(buffers)[0]
        except BlockingIOError:
            return None
        except OSError:
            return 0

    def send(self, buffers: Sequence[memoryview | bytearray]) -> int:
        """One system call, mostly."""
        try:
            if len(buffers) == 1:
                size = len(buffers[0])
                sent = self._socket.send(buffers[0])
            else:
                size = sum(map(len, buffers))
                sent = self._socket.sendmsg(buffers)
        except BlockingIOError:
            sent = 0
        full = sent < size
        if full != self._full:
            self._full = full
            self._loop.change(self._socket.fileno(), READABLE | select.EPOLLOUT if full else READABLE)
        return sent

    def end(self) -> None:
        """Shut down one direction."""
        self._shut_down(socket.SHUT_WR)

    def refuse(self) -> None:
        """Shut down the other."""
        self._shut_down(socket.SHUT_RD)

    def _shut_down(self, how: int) -> None:
        with suppress(OSError):  # the other side is gone already
            self._socket.shutdown(how)

    def close(self) -> None:
        """Close the socket, after this batch of events."""
        self._loop.retire(self._socket)


class HeartbeatStream:
    """Answers 0xB7 by 0xB7 and ends; anything else, without a word (see ``vsock.Stream``)."""

    def __init__(self, on_heartbeat: Callable[[], None]) -> None:
        self._on_heartbeat = on_heartbeat
        self._answer: bytes | None = None
        """What is still to be read; None before anything was heard."""

    def attach(self, on_event: Callable[[int], None]) -> None:
        """The one event: there is an answer, or the end."""
        self._on_event = on_event

    def receive(self, buffers: Sequence[memoryview]) -> int | None:
        """The answer, then the end."""
        if not self._answer:
            return None if self._answer is None else 0
        buffers[0][:1] = self._answer
        self._answer = b""
        return 1

    def send(self, buffers: Sequence[memoryview | bytearray]) -> int:
        """Only the first byte counts."""
        if self._answer is None:
            alive = buffers[0][0] == HEARTBEAT
            self._answer = bytes([HEARTBEAT]) if alive else b""
            self._on_event(select.EPOLLIN | select.EPOLLHUP)
            if alive:
                self._on_heartbeat()
        return sum(map(len, buffers))

    def end(self) -> None:
        """The guest will say no more: if it has not said anything, neither shall we."""
        if self._answer is None:
            self._answer = b""
            self._on_event(select.EPOLLIN | select.EPOLLHUP)

    def refuse(self) -> None:
        """Nothing to stop."""

    def close(self) -> None:
        """Nothing to close."""
