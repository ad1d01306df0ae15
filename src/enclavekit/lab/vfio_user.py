# SPDX-License-Identifier: Apache-2.0
"""vfio-user, the server's side: a PCI device in this process, for a QEMU with ``-device vfio-user-pci``.

Source: QEMU docs/interop/vfio-user.rst. Nothing here knows what device it is. The client asks, the server answers at
once; the other direction, which the protocol has too, is not used: guest memory is reached through its files.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Mapping, Sequence
from enum import Enum
from struct import Struct
from types import MappingProxyType
from typing import Protocol

from enclavekit.errors import ProtocolError
from enclavekit.lab.dma import DmaMaps
from enclavekit.lab.interrupts import Interrupts
from enclavekit.lab.vfio_user_message import (
    CAPABILITIES,
    DEVICE_INFO,
    DEVICE_PCI,
    DEVICE_RESET,
    DMA_MAP,
    DMA_UNMAP,
    DMA_UNMAP_ALL,
    HEADER,
    IRQ_EVENTFD,
    IRQ_INFO,
    IRQS,
    MAX_FDS,
    MAX_MESSAGE,
    MSIX_IRQ,
    REGION_ACCESS,
    REGION_INFO,
    REGION_READABLE,
    REGION_WRITABLE,
    REGIONS,
    SET_IRQS,
    VERSION,
    Command,
    Flags,
    SetIrqs,
)

MAX_AT_ONCE = 64
"""Messages; a command of the driver and its reply are about 30."""


class PciDevice(Protocol):
    """What the transport needs of a device. All is called in one thread."""

    @property
    def regions(self) -> Mapping[int, int]:
        """Sizes by index: BARs 0 to 5, configuration space 7. Those that are not named do not exist."""

    def read(self, region: int, offset: int, size: int) -> bytes:
        """So many bytes; they are within the region."""

    def write(self, region: int, offset: int, data: bytes) -> None:
        """They are within the region."""

    def reset(self) -> None:
        """As after power-on."""


class State(Enum):
    """Of a connection."""

    WAITING = "waiting for the version"
    READY = "ready"
    CLOSED = "closed"


TRANSITIONS: Mapping[State, Mapping[Command, State]] = MappingProxyType(
    {
        State.WAITING: {Command.VERSION: State.READY},
        State.READY: {command: State.READY for command in Command if command is not Command.VERSION},
        State.CLOSED: {},
    }
)
"""Which message may come when, and where it leads. End of file and broken rules lead to CLOSED from everywhere."""


class _Refused(Exception):  # noqa: N818 - an answer, not an error
    """The request has an error for its reply, and the connection goes on."""


class VfioUser:
    """Serves one connection. ``process`` reads what is there; ``close`` gives back what the client gave.

    A peer that breaks the protocol raises ``ProtocolError``; after that only ``close`` is left.
    """

    def __init__(self, transport: socket.socket, device: PciDevice, memory: DmaMaps, interrupts: Interrupts) -> None:
        transport.setblocking(False)
        self.state = State.WAITING
        self._transport = transport
        self._device = device
        self._memory = memory
        self._interrupts = interrupts
        self._head = b""
        self._body = b""
        self._fds: list[int] = []

    def fileno(self) -> int:
        """Of the socket: wait until it is readable."""
        return self._transport.fileno()

    @property
    def ended(self) -> bool:
        """The client has gone, or broke the protocol."""
        return self.state is State.CLOSED

    def process(self) -> bool:
        """Answer messages that are there, not too many at once; True when there may be more."""
        try:
            for _ in range(MAX_AT_ONCE):
                if self.ended or not self._read():
                    return False
                head, body, fds = self._head, self._body, self._fds
                self._head, self._body, self._fds = b"", b"", []
                try:
                    self._answer(head, body, fds)
                finally:
                    _close_all(fds)  # who wants to keep one has made a duplicate
        except ProtocolError:
            self.state = State.CLOSED
            raise
        return True

    def close(self) -> None:
        """Twice does no harm."""
        self.state = State.CLOSED
        _close_all(self._fds)
        self._fds = []
        self._interrupts.close()
        self._memory.close()
        self._transport.close()

    # Messages

    def _read(self) -> bool:
        """True once a whole message is there. Header and body are read apart, for fds come with the header."""
        try:
            while len(self._head) < HEADER.size:
                data, ancillary, flags, _ = self._transport.recvmsg(
                    HEADER.size - len(self._head),
                    socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize),
                    socket.MSG_CMSG_CLOEXEC,
                )
                self._collect(ancillary)
                if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
                    raise ProtocolError(
                        f"vfio-user: a message with more than {MAX_FDS} descriptors, or than we may have"
                    )
                if not data:
                    self.state = State.CLOSED
                    return False
                self._head += data
            _, command, size, kind, _ = HEADER.unpack(self._head)
            if kind & ~Flags.NO_REPLY:
                raise ProtocolError(f"vfio-user: command {command}: flags {kind:#x}, expected those of a request")
            if not HEADER.size <= size <= MAX_MESSAGE:
                raise ProtocolError(
                    f"vfio-user: command {command}: {size} bytes, expected {HEADER.size} to {MAX_MESSAGE}"
                )
            while len(self._body) < size - HEADER.size:
                data = self._transport.recv(size - HEADER.size - len(self._body))
                if not data:
                    self.state = State.CLOSED
                    return False
                self._body += data
        except BlockingIOError:
            return False
        except ConnectionError:
            self.state = State.CLOSED
            return False
        return True

    def _collect(self, ancillary: Sequence[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds += fds

    def _answer(self, head: bytes, body: bytes, fds: Sequence[int]) -> None:
        number, code, _, flags, _ = HEADER.unpack(head)
        try:
            command = Command(code)
        except ValueError:
            raise ProtocolError(f"vfio-user: command {code} is not known") from None
        try:
            self.state = TRANSITIONS[self.state][command]
        except KeyError:
            raise ProtocolError(f"vfio-user: {command.name} is not expected in state '{self.state.value}'") from None
        kind, failed = Flags.REPLY, 0
        try:
            reply = self._handle(command, body, fds)
        except _Refused as refused:
            kind, failed, reply = Flags.REPLY | Flags.ERROR, refused.args[0], b""
        if not flags & Flags.NO_REPLY:
            self._send(HEADER.pack(number, command, HEADER.size + len(reply), kind, failed) + reply)

    def _send(self, message: bytes) -> None:
        try:
            sent = self._transport.send(message)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            self.state = State.CLOSED
            return
        if sent < len(message):
            raise ProtocolError("vfio-user: the client does not read its replies")

    # Commands

    def _handle(self, command: Command, body: bytes, fds: Sequence[int]) -> bytes:
        """Do one; returns the body of its reply."""
        allowed = {Command.DMA_MAP: 1, Command.DEVICE_SET_IRQS: MAX_FDS}.get(command, 0)
        if len(fds) > allowed:
            raise ProtocolError(f"vfio-user: {command.name}: {len(fds)} descriptors, expected at most {allowed}")
        if command is Command.DMA_MAP:
            return self._map(body, fds)
        if command is Command.DEVICE_SET_IRQS:
            return self._set_irqs(body, fds)
        handler = {
            Command.VERSION: self._version,
            Command.DMA_UNMAP: self._unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.REGION_READ: self._read_region,
            Command.REGION_WRITE: self._write_region,
            Command.DEVICE_RESET: self._reset,
        }.get(command)
        if handler is None:
            raise _Refused(errno.ENOTSUP)
        return handler(body)

    def _version(self, body: bytes) -> bytes:
        """What the client can is not asked for: nothing that it could lack is used."""
        if len(body) < VERSION.size:
            raise ProtocolError(f"vfio-user: VERSION: {len(body)} bytes, expected {VERSION.size} and more")
        major, _ = VERSION.unpack_from(body)
        if major != 0:
            raise ProtocolError(f"vfio-user: version {major}, expected 0")
        return VERSION.pack(0, 0) + CAPABILITIES

    def _map(self, body: bytes, fds: Sequence[int]) -> bytes:
        _, flags, offset, address, size = _unpack(Command.DMA_MAP, DMA_MAP, body)
        self._memory.add(address, size, flags, fds[0] if fds else None, offset)
        return b""

    def _unmap(self, body: bytes) -> bytes:
        _, flags, address, size = _unpack(Command.DMA_UNMAP, DMA_UNMAP, body)
        if flags & ~DMA_UNMAP_ALL:
            raise _Refused(errno.EINVAL)  # a record of what was written to
        if flags:
            self._memory.clear()
        else:
            self._memory.remove(address, size)
        return body

    def _device_info(self, body: bytes) -> bytes:
        _unpack(Command.DEVICE_GET_INFO, DEVICE_INFO, body)
        return DEVICE_INFO.pack(DEVICE_INFO.size, DEVICE_RESET | DEVICE_PCI, REGIONS, IRQS)

    def _region_info(self, body: bytes) -> bytes:
        _, _, index, _, _, _ = _unpack(Command.DEVICE_GET_REGION_INFO, REGION_INFO, body)
        if index >= REGIONS:
            raise ProtocolError(f"vfio-user: region {index}, a PCI device has {REGIONS}")
        size = self._device.regions.get(index, 0)
        flags = REGION_READABLE | REGION_WRITABLE if size else 0
        return REGION_INFO.pack(REGION_INFO.size, flags, index, 0, size, 0)

    def _irq_info(self, body: bytes) -> bytes:
        _, _, index, _ = _unpack(Command.DEVICE_GET_IRQ_INFO, IRQ_INFO, body)
        return IRQ_INFO.pack(IRQ_INFO.size, IRQ_EVENTFD, index, self._vectors(Command.DEVICE_GET_IRQ_INFO, index))

    def _vectors(self, command: Command, index: int) -> int:
        if index >= IRQS:
            raise ProtocolError(f"vfio-user: {command.name}: interrupts of kind {index}, a PCI device has {IRQS}")
        return self._interrupts.count if index == MSIX_IRQ else 0

    def _set_irqs(self, body: bytes, fds: Sequence[int]) -> bytes:
        """Eventfds for vectors; none for some; none for all."""
        command = Command.DEVICE_SET_IRQS
        _, flags, index, start, count = _unpack(command, SET_IRQS, body)
        vectors = self._vectors(command, index)
        if start + count > vectors:
            raise ProtocolError(f"vfio-user: vectors {start} to {start + count} of kind {index}, there are {vectors}")
        if fds and (len(fds) != count or not flags & SetIrqs.DATA_EVENTFD):
            raise ProtocolError(f"vfio-user: {len(fds)} eventfds for {count} vectors")
        if flags == SetIrqs.DATA_EVENTFD | SetIrqs.ACTION_TRIGGER and fds:
            self._interrupts.set(start, fds)
        elif flags == SetIrqs.DATA_EVENTFD | SetIrqs.ACTION_TRIGGER:
            self._interrupts.clear(start, count)
        elif flags == SetIrqs.DATA_NONE | SetIrqs.ACTION_TRIGGER and not count:
            if index == MSIX_IRQ:
                self._interrupts.close()
        else:
            raise _Refused(errno.EINVAL)
        return b""

    def _read_region(self, body: bytes) -> bytes:
        offset, region, count = _unpack(Command.REGION_READ, REGION_ACCESS, body)
        self._check_access(Command.REGION_READ, region, offset, count)
        return body + self._device.read(region, offset, count)

    def _write_region(self, body: bytes) -> bytes:
        if len(body) < REGION_ACCESS.size:
            raise ProtocolError(f"vfio-user: REGION_WRITE: {len(body)} bytes, expected {REGION_ACCESS.size} and more")
        head, data = body[: REGION_ACCESS.size], body[REGION_ACCESS.size :]
        offset, region, count = REGION_ACCESS.unpack(head)
        if count != len(data):
            raise ProtocolError(f"vfio-user: REGION_WRITE: {len(data)} bytes of data, expected {count}")
        self._check_access(Command.REGION_WRITE, region, offset, count)
        self._device.write(region, offset, data)
        return head

    def _check_access(self, command: Command, region: int, offset: int, count: int) -> None:
        size = self._device.regions.get(region, 0)
        if offset + count > size:
            raise ProtocolError(
                f"vfio-user: {command.name}: {count} bytes at {offset:#x} of region {region}, which has {size}"
            )

    def _reset(self, body: bytes) -> bytes:
        if body:
            raise ProtocolError(f"vfio-user: DEVICE_RESET: {len(body)} bytes, expected none")
        self._device.reset()
        return b""


def _unpack(command: Command, layout: Struct, body: bytes) -> tuple[int, ...]:
    if len(body) != layout.size:
        raise ProtocolError(f"vfio-user: {command.name}: {len(body)} bytes, expected {layout.size}")
    return layout.unpack(body)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
