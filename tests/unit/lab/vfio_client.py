# SPDX-License-Identifier: Apache-2.0
"""A vfio-user client that speaks as QEMU does, and on it a driver that speaks as Linux's does: no virtual machine."""

from __future__ import annotations

import array
import os
import select
import socket
from collections.abc import Callable, Sequence

from enclavekit.lab.ne_registers import (
    NE_COMMAND,
    NE_ENABLE,
    NE_RECV_DATA,
    NE_SEND_DATA,
    NE_VERSION,
    REGISTER_BAR,
    REPLY,
    REQUESTS,
    VECTORS,
    Reply,
)
from enclavekit.lab.ne_registers import Command as NeCommand
from enclavekit.lab.vfio_user_message import (
    DMA_MAP,
    DMA_READ,
    DMA_UNMAP,
    DMA_WRITE,
    HEADER,
    MSIX_IRQ,
    REGION_ACCESS,
    SET_IRQS,
    VERSION,
    Command,
    Flags,
    SetIrqs,
)

TIMEOUT_S = 20.0
WORD = 4


class VfioClient:
    """Speaks over ``transport``, which blocks. ``sent`` is called after each message: a server of the same thread."""

    def __init__(self, transport: socket.socket, sent: Callable[[], object] = lambda: None) -> None:
        self.transport = transport
        self._sent = sent
        transport.settimeout(TIMEOUT_S)
        self._next_id = 0

    def send(self, command: int, body: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> int:
        """One message; its id."""
        self._next_id = self._next_id + 1 & 0xFFFF
        head = HEADER.pack(self._next_id, command, HEADER.size + len(body), flags, 0)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.transport.sendmsg([head, body], ancillary)
        self._sent()
        return self._next_id

    def ask(self, command: int, body: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """A request, and its reply's body. OSError where the reply is an error."""
        number = self.send(command, body, fds)
        head = self._exactly(HEADER.size)
        got, code, size, flags, failed = HEADER.unpack(head)
        assert (got, code) == (number, command)
        reply = self._exactly(size - HEADER.size)
        if flags & Flags.ERROR:
            raise OSError(failed, os.strerror(failed))
        assert flags == Flags.REPLY
        return reply

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.transport.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def negotiate(self) -> bytes:
        """The first message; what the server can."""
        return self.ask(Command.VERSION, VERSION.pack(0, 0) + b'{"capabilities":{}}\0')[VERSION.size :]

    def map(
        self, address: int, size: int, fd: int | None = None, offset: int = 0, flags: int = DMA_READ | DMA_WRITE
    ) -> None:
        """Guest memory that is in a file, or is not."""
        self.ask(Command.DMA_MAP, DMA_MAP.pack(DMA_MAP.size, flags, offset, address, size), [] if fd is None else [fd])

    def unmap(self, address: int, size: int, flags: int = 0) -> None:
        """As it was mapped, or all."""
        self.ask(Command.DMA_UNMAP, DMA_UNMAP.pack(DMA_UNMAP.size, flags, address, size))

    def set_eventfds(self, fds: Sequence[int], start: int = 0, count: int | None = None) -> None:
        """For MSI-X; with a count and no descriptors, for none."""
        words = SET_IRQS.pack(
            SET_IRQS.size, SetIrqs.DATA_EVENTFD | SetIrqs.ACTION_TRIGGER, MSIX_IRQ, start, count or len(fds)
        )
        self.ask(Command.DEVICE_SET_IRQS, words, fds)

    def read(self, region: int, offset: int, size: int) -> bytes:
        """Of a region."""
        access = REGION_ACCESS.pack(offset, region, size)
        reply = self.ask(Command.REGION_READ, access)
        assert reply[: len(access)] == access
        return reply[len(access) :]

    def write(self, region: int, offset: int, data: bytes, *, posted: bool = True) -> None:
        """To a region; as QEMU does, BARs are not waited for."""
        body = REGION_ACCESS.pack(offset, region, len(data)) + data
        if posted:
            self.send(Command.REGION_WRITE, body, flags=Flags.NO_REPLY)
        else:
            assert self.ask(Command.REGION_WRITE, body) == body[: REGION_ACCESS.size]


class NeDriver:
    """What Linux's driver does, without a kernel: ``client`` has memory mapped or not."""

    def __init__(self, client: VfioClient) -> None:
        self.client = client
        self.eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(VECTORS)]

    def probe(self) -> None:
        """Interrupts, off, version, on."""
        self.client.set_eventfds(self.eventfds)
        self.client.write(REGISTER_BAR, NE_ENABLE, b"\0")
        assert self.client.read(REGISTER_BAR, NE_ENABLE, 1) == b"\0"
        self.client.write(REGISTER_BAR, NE_VERSION, b"\1\0")
        assert self.client.read(REGISTER_BAR, NE_VERSION, 2) == b"\1\0"
        self.client.write(REGISTER_BAR, NE_ENABLE, b"\1")
        assert self.client.read(REGISTER_BAR, NE_ENABLE, 1) == b"\1"

    def post(self, command: int, *words: int) -> None:
        """A command that is not waited for."""
        request = REQUESTS[NeCommand(command)].pack(*words) or b"\0"
        for place in range(0, len(request), WORD):
            self.client.write(REGISTER_BAR, NE_SEND_DATA + place, request[place : place + WORD])
        self.client.write(REGISTER_BAR, NE_COMMAND, command.to_bytes(4, "little"))

    def do(self, command: int, *words: int) -> Reply:
        """A command, and its reply. OSError for a negative one."""
        self.post(command, *words)
        self.wait(0)
        reply = self.reply()
        if reply.rc < 0:
            raise OSError(-reply.rc, os.strerror(-reply.rc))
        return reply

    def reply(self) -> Reply:
        """What is in the registers, read in words of four bytes."""
        places = range(NE_RECV_DATA, NE_RECV_DATA + REPLY.size, WORD)
        return Reply.parse(b"".join(self.client.read(REGISTER_BAR, place, WORD) for place in places))

    def wait(self, vector: int) -> None:
        """For an interrupt."""
        if not select.select([self.eventfds[vector]], [], [], TIMEOUT_S)[0]:
            raise TimeoutError(f"no interrupt {vector}")
        os.eventfd_read(self.eventfds[vector])

    def close(self) -> None:
        """As QEMU does at its end."""
        for fd in self.eventfds:
            os.close(fd)
        self.client.transport.close()
