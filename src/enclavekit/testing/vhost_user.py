# SPDX-License-Identifier: Apache-2.0
"""A vhost-user front-end in Python: what QEMU says to a device, without QEMU.

Source: QEMU docs/interop/vhost-user.rst. The guest's memory is a memfd; map it, and let a ``MockQueue`` drive it.
"""

from __future__ import annotations

import array
import mmap
import os
import select
import socket
from collections.abc import Sequence

from enclavekit.testing.virtio import MockQueue
from enclavekit.virtio.vhost_user_message import (
    CONFIG_HEADER,
    HEADER,
    MEMORY_REGION,
    MEMORY_TABLE,
    NEED_REPLY,
    PROTOCOL_FEATURES,
    U64,
    VERSION,
    VRING_ADDRESS,
    VRING_STATE,
    Request,
)

USER_BASE = 0x7F0000000000
"""Where guest address 0 is said to be in the front-end's memory."""


class MockFrontEnd:
    """Speaks over ``transport``, which blocks. ``memory`` is the guest's, ``size`` bytes from guest address 0."""

    def __init__(self, transport: socket.socket, size: int) -> None:
        self.transport = transport
        self.memory_fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.memory_fd, size)
        self.memory = memoryview(mmap.mmap(self.memory_fd, size))
        self.kicks: list[int] = []
        self.calls: list[int] = []

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = VERSION) -> None:
        """One message."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.transport.sendmsg([HEADER.pack(request, flags, len(payload)), payload], ancillary)

    def reply(self) -> tuple[int, int, bytes]:
        """The next reply: request, flags, payload."""
        head = self.transport.recv(HEADER.size, socket.MSG_WAITALL)
        request, flags, size = HEADER.unpack(head)
        return request, flags, self.transport.recv(size, socket.MSG_WAITALL) if size else b""

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        """A request that has a reply of its own."""
        self.send(request, payload)
        return self.reply()[2]

    def sync(self) -> None:
        """Until the back-end has done all that was said."""
        self.ask(Request.GET_FEATURES)

    def handshake(self) -> bytes:
        """What QEMU says before the guest runs; returns the configuration space."""
        self.send(Request.SET_OWNER)
        (self.features,) = U64.unpack(self.ask(Request.GET_FEATURES))
        (offered,) = U64.unpack(self.ask(Request.GET_PROTOCOL_FEATURES))
        self.send(Request.SET_PROTOCOL_FEATURES, U64.pack(offered & PROTOCOL_FEATURES))
        self.ask(Request.GET_QUEUE_NUM)
        return self.ask(Request.GET_CONFIG, CONFIG_HEADER.pack(0, 8, 0) + bytes(8))[CONFIG_HEADER.size :]

    def set_memory(self) -> None:
        """One region: all of it."""
        payload = MEMORY_TABLE.pack(1, 0) + MEMORY_REGION.pack(0, len(self.memory), USER_BASE, 0)
        self.send(Request.SET_MEM_TABLE, payload, [self.memory_fd], flags=VERSION | NEED_REPLY)
        self.reply()

    def start(self, queues: Sequence[MockQueue], base: int = 0) -> None:
        """What QEMU says when the guest's driver is ready."""
        self.send(Request.SET_FEATURES, U64.pack(self.features))
        self.set_memory()
        self._close_eventfds()
        for index, queue in enumerate(queues):
            self.kicks.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self.calls.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self.send(Request.SET_VRING_NUM, VRING_STATE.pack(index, queue.size))
            self.send(Request.SET_VRING_BASE, VRING_STATE.pack(index, base))
            user = (USER_BASE + gpa for gpa in (queue.gpa, queue.used_gpa, queue.available_gpa))
            self.send(Request.SET_VRING_ADDR, VRING_ADDRESS.pack(index, 0, *user, 0))
            self.send(Request.SET_VRING_KICK, U64.pack(index), [self.kicks[index]])
            self.send(Request.SET_VRING_CALL, U64.pack(index), [self.calls[index]])
        for index in range(len(queues)):
            self.send(Request.SET_VRING_ENABLE, VRING_STATE.pack(index, 1))
        self.sync()

    def stop(self, count: int) -> list[int]:
        """What QEMU says when the guest is reset; returns where each queue stopped."""
        for index in range(count):
            self.send(Request.SET_VRING_ENABLE, VRING_STATE.pack(index, 0))
        return [
            VRING_STATE.unpack(self.ask(Request.GET_VRING_BASE, VRING_STATE.pack(index, 0)))[1]
            for index in range(count)
        ]

    def kick(self, index: int) -> None:
        """Tell the device that a queue has something new."""
        os.eventfd_write(self.kicks[index], 1)

    def wait(self, index: int, timeout_s: float = 20.0) -> None:
        """For a queue's interrupt."""
        if not select.select([self.calls[index]], [], [], timeout_s)[0]:
            raise TimeoutError(f"no interrupt of queue {index} within {timeout_s:g} s")
        os.eventfd_read(self.calls[index])

    def close(self) -> None:
        """As QEMU does at its end."""
        self._close_eventfds()
        self.transport.close()
        os.close(self.memory_fd)

    def _close_eventfds(self) -> None:
        for fd in (*self.kicks, *self.calls):
            os.close(fd)
        self.kicks, self.calls = [], []
