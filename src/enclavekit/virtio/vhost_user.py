# SPDX-License-Identifier: Apache-2.0
"""vhost-user, the backend's side: QEMU gives a device's rings, memory and eventfds over a Unix socket.

Source: QEMU docs/interop/vhost-user.rst. Messages are a 12-byte header and a payload; descriptors come with them. Only
what QEMU's vsock device needs is offered, so only that can be asked. The peer runs a hostile guest: every number is
checked, and an error is the end of the device, not of this process.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from struct import Struct
from typing import Protocol

from enclavekit.errors import ProtocolError
from enclavekit.virtio.loop import READ, Loop
from enclavekit.virtio.memory import GuestMemory, Region
from enclavekit.virtio.queue import MAX_QUEUE_SIZE, Queue, avail_size, table_size, used_size

HEADER = Struct(
    "<"  #  native byte order, which is little-endian here
    "I"  # 0x0 request
    "I"  # 0x4 flags: version 1, bit 2 reply, bit 3 reply wanted
    "I"  # 0x8 payload size, bytes
)
U64 = Struct("<Q")
VRING_STATE = Struct("<II")  # index, number
VRING_ADDRESS = Struct("<IIQQQQ")  # index, flags, descriptors, used, avail, log: addresses in QEMU's space
MEMORY_TABLE = Struct("<II")  # count of regions, padding
MEMORY_REGION = Struct("<QQQQ")  # guest physical address, size, address in QEMU, offset in the file
CONFIG = Struct("<III")  # offset, size, flags; then the bytes

VERSION, REPLY, NEED_REPLY = 1, 4, 8
MAX_PAYLOAD = 4096
MAX_REGIONS = 8
MAX_FDS = 8
NO_FD = 1 << 8
MESSAGE_TIMEOUT_S = 10.0

VIRTIO_F_VERSION_1 = 1 << 32
VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30
FEATURES = VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES
PROTOCOL_F_MQ, PROTOCOL_F_REPLY_ACK, PROTOCOL_F_CONFIG = 1 << 0, 1 << 3, 1 << 9
PROTOCOL_FEATURES = PROTOCOL_F_MQ | PROTOCOL_F_REPLY_ACK | PROTOCOL_F_CONFIG
"""CONFIG must be there: without it QEMU's vsock device does not start."""


class Request(IntEnum):
    """VHOST_USER_* requests that can come."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25


class Device(Protocol):
    """What a transport carries."""

    def config(self) -> bytes:
        """The configuration space."""

    def activate(self, queues: list[Queue], notify: Callable[[int], None]) -> None:
        """All queues are there."""

    def reset(self) -> None:
        """The queues are gone."""

    def kicked(self, index: int) -> None:
        """The driver has put something into a queue."""


@dataclass(slots=True)
class Vring:
    """One queue as QEMU has described it so far."""

    size: int = 0
    addresses: tuple[int, int, int] | None = None
    base: int = 0
    kick: int = -1
    call: int = -1
    enabled: bool = False
    queue: Queue | None = None


@dataclass(frozen=True, slots=True)
class Mapping:
    """A memory region: by guest physical address, and by QEMU's own."""

    region: Region
    qemu_address: int


class VhostUser:
    """The backend at one connected socket."""

    def __init__(self, loop: Loop, transport: socket.socket, device: Device, queues: int) -> None:
        self._loop = loop
        self._transport = transport
        self._device = device
        self._vrings = [Vring() for _ in range(queues)]
        self._mappings: list[Mapping] = []
        self._maps: list[mmap.mmap] = []
        self._active = False
        self.error: ProtocolError | None = None
        """Why the device went off, if the peer broke the protocol."""
        transport.settimeout(MESSAGE_TIMEOUT_S)
        loop.watch(transport, READ, self._readable)

    def close(self) -> None:
        """Give everything back; the loop's thread, or after it has ended. Twice does no harm."""
        if self._transport.fileno() < 0:
            return
        self._stop()
        self._loop.watch(self._transport, 0, lambda _: None)
        for vring in self._vrings:
            self._close_kick(vring)
            _close(vring.call)
            vring.call = -1
        self._forget_memory()
        self._transport.close()

    def _readable(self, events: int) -> None:
        del events
        fds: list[int] = []
        try:
            head, fds = self._receive_head()
            if head is None:
                self.close()
                return
            request, flags, size = HEADER.unpack(head)
            if flags & 3 != VERSION or size > MAX_PAYLOAD:
                raise ProtocolError(f"vhost-user request {request}: flags 0x{flags:x}, {size} bytes of payload")
            payload = self._receive(size)
            answer = self._handle(request, payload, fds)
            if answer is None and flags & NEED_REPLY:
                answer = U64.pack(0)
            if answer is not None:
                self._transport.sendall(HEADER.pack(request, VERSION | REPLY, len(answer)) + answer)
        except ProtocolError as error:
            self.error = error
            self.close()
        except OSError as error:
            self.error = ProtocolError(f"vhost-user: {error}")
            self.close()
        finally:
            for fd in fds:
                _close(fd)

    def _receive_head(self) -> tuple[bytes | None, list[int]]:
        head, fds, _, _ = socket.recv_fds(self._transport, HEADER.size, MAX_FDS)
        for fd in fds:
            os.set_inheritable(fd, False)
        if not head:
            return None, fds
        return head + self._receive(HEADER.size - len(head)), fds

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._transport.recv(size - len(data))
            if not part:
                raise ProtocolError(f"vhost-user: need {size} bytes, have {len(data)}")
            data += part
        return data

    def _handle(  # noqa: PLR0912, PLR0915 - one case a request
        self, request: int, payload: bytes, fds: list[int]
    ) -> bytes | None:
        """Carry out a request; bytes are its reply. Descriptors that are kept are taken out of ``fds``."""
        match request:
            case Request.GET_FEATURES:
                return U64.pack(FEATURES)
            case Request.GET_PROTOCOL_FEATURES:
                return U64.pack(PROTOCOL_FEATURES)
            case Request.GET_QUEUE_NUM:
                return U64.pack(len(self._vrings))
            case Request.SET_FEATURES | Request.SET_PROTOCOL_FEATURES | Request.SET_OWNER | Request.SET_CONFIG:
                pass
            case Request.RESET_OWNER:
                self._stop()
            case Request.SET_MEM_TABLE:
                self._set_memory(payload, fds)
            case Request.GET_CONFIG:
                return self._config(payload)
            case Request.SET_VRING_NUM:
                vring, number = self._vring_state(payload)
                if not 1 <= number <= MAX_QUEUE_SIZE:
                    raise ProtocolError(f"vhost-user: queue of {number}, expected 1 to {MAX_QUEUE_SIZE}")
                vring.size = number
            case Request.SET_VRING_BASE:
                vring, vring.base = self._vring_state(payload)
            case Request.SET_VRING_ADDR:
                index, _, table, used, avail, _ = _unpack(VRING_ADDRESS, payload)
                self._vring(index).addresses = (table, avail, used)
            case Request.GET_VRING_BASE:
                vring, _ = self._vring_state(payload)
                self._stop()
                vring.enabled = False
                base = vring.base if vring.queue is None else vring.queue.last_avail
                vring.queue = None
                self._close_kick(vring)
                return VRING_STATE.pack(self._vrings.index(vring), base)
            case Request.SET_VRING_KICK:
                vring, fd = self._vring_fd(payload, fds)
                self._close_kick(vring)
                vring.kick = fd
                self._start()
            case Request.SET_VRING_CALL:
                vring, fd = self._vring_fd(payload, fds)
                _close(vring.call)
                vring.call = fd
                if self._active:
                    self._notify(self._vrings.index(vring))  # what the old one was told may be lost
            case Request.SET_VRING_ERR:
                pass  # its descriptor is closed
            case Request.SET_VRING_ENABLE:
                vring, number = self._vring_state(payload)
                vring.enabled = bool(number)
                if vring.enabled:
                    self._start()
                else:
                    self._stop()
            case _:
                raise ProtocolError(f"vhost-user: request {request}, which was not offered")
        return None

    # ---- memory ----

    def _set_memory(self, payload: bytes, fds: list[int]) -> None:
        self._stop()
        self._forget_memory()
        count = _unpack(MEMORY_TABLE, payload)[0]
        if not 1 <= count <= MAX_REGIONS or count != len(fds):
            raise ProtocolError(f"vhost-user: {count} memory regions with {len(fds)} descriptors")
        for number, fd in enumerate(fds):
            address, size, qemu_address, offset = _unpack(MEMORY_REGION, payload[8 + 32 * number :])
            if not size or size >> 48 or offset >> 48 or os.fstat(fd).st_size < offset + size:
                raise ProtocolError(f"vhost-user: memory region of {size} bytes at offset {offset} is past its file")
            mapped = mmap.mmap(fd, offset + size)
            self._maps.append(mapped)
            view = memoryview(mapped)[offset:]
            self._mappings.append(Mapping(Region(address, view), qemu_address))

    def _forget_memory(self) -> None:
        self._mappings = []
        for vring in self._vrings:
            vring.queue = None
        for mapped in self._maps:
            with contextlib.suppress(BufferError):  # a view is on its way still; the mapping goes with it
                mapped.close()
        self._maps = []

    def _at(self, qemu_address: int, size: int) -> memoryview:
        for mapping in self._mappings:
            offset = qemu_address - mapping.qemu_address
            if offset >= 0 and offset + size <= len(mapping.region.buffer):
                return mapping.region.buffer[offset : offset + size]
        raise ProtocolError(f"vhost-user: ring at 0x{qemu_address:x}, {size} bytes, is not in guest memory")

    # ---- rings ----

    def _start(self) -> None:
        """When every ring is described, enabled and can be kicked, the device may run."""
        if self._active or not all(v.enabled and v.kick >= 0 and v.addresses and v.size for v in self._vrings):
            return
        memory = GuestMemory([mapping.region for mapping in self._mappings])
        queues = []
        for vring in self._vrings:
            table, avail, used = vring.addresses or (0, 0, 0)
            vring.queue = Queue(
                memory,
                vring.size,
                self._at(table, table_size(vring.size)),
                self._at(avail, avail_size(vring.size)),
                self._at(used, used_size(vring.size)),
            )
            vring.queue.last_avail = vring.base & 0xFFFF
            queues.append(vring.queue)
        self._active = True
        for index, vring in enumerate(self._vrings):
            self._loop.watch(vring.kick, READ, partial(self._kicked, index, vring.kick))
        self._device.activate(queues, self._notify)

    def _stop(self) -> None:
        if self._active:
            self._active = False
            for vring in self._vrings:
                self._loop.watch(vring.kick, 0, lambda _: None)
                if vring.queue is not None:
                    vring.base = vring.queue.last_avail
            self._device.reset()

    def _kicked(self, index: int, fd: int, events: int) -> None:
        del events
        with contextlib.suppress(BlockingIOError):
            os.read(fd, 8)
        self._device.kicked(index)

    def _notify(self, index: int) -> None:
        call = self._vrings[index].call
        if call >= 0:
            with contextlib.suppress(OSError):
                os.write(call, U64.pack(1))

    def _close_kick(self, vring: Vring) -> None:
        if vring.kick >= 0:
            self._loop.watch(vring.kick, 0, lambda _: None)
            _close(vring.kick)
            vring.kick = -1

    def _vring(self, index: int) -> Vring:
        if index >= len(self._vrings):
            raise ProtocolError(f"vhost-user: queue {index}, expected less than {len(self._vrings)}")
        return self._vrings[index]

    def _vring_state(self, payload: bytes) -> tuple[Vring, int]:
        index, number = _unpack(VRING_STATE, payload)
        return self._vring(index), number

    def _vring_fd(self, payload: bytes, fds: list[int]) -> tuple[Vring, int]:
        value = _unpack(U64, payload)[0]
        vring = self._vring(value & 0xFF)
        if value & NO_FD:
            return vring, -1
        if len(fds) != 1:
            raise ProtocolError(f"vhost-user: {len(fds)} descriptors with a queue's eventfd, expected 1")
        return vring, fds.pop()

    def _config(self, payload: bytes) -> bytes:
        offset, size, flags = _unpack(CONFIG, payload)
        space = self._device.config()
        if len(payload) != CONFIG.size + size or offset + size > len(space):
            return b""  # QEMU takes this for an error
        return CONFIG.pack(offset, size, flags) + space[offset : offset + size]


def _unpack(layout: Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) < layout.size:
        raise ProtocolError(f"vhost-user: need {layout.size} bytes of payload, have {len(payload)}")
    return layout.unpack_from(payload)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
