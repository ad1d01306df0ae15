# SPDX-License-Identifier: Apache-2.0
"""vhost-user, the back-end's side: QEMU hands over guest memory, rings and eventfds through a Unix socket.

Source: QEMU docs/interop/vhost-user.rst. The least that QEMU's devices need is offered: MQ, REPLY_ACK (a point where
both sides agree), and for a device with a configuration CONFIG (the vsock device does not start without). A guest that
boots again is a new start of the rings on the same connection.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Sequence
from struct import Struct
from typing import NamedTuple, Protocol

from enclavekit.errors import ProtocolError
from enclavekit.virtio.memory import GuestMemory, MemoryRegion
from enclavekit.virtio.queue import (
    MAX_SIZE,
    VIRTIO_F_INDIRECT_DESC,
    Virtqueue,
    available_size,
    descriptors_size,
    used_size,
)
from enclavekit.virtio.vhost_user_message import (
    CONFIG_HEADER,
    HEADER,
    MAX_CONFIG,
    MAX_FDS,
    MAX_PAYLOAD,
    MEMORY_REGION,
    MEMORY_TABLE,
    NEED_REPLY,
    PROTOCOL_F_CONFIG,
    PROTOCOL_F_REPLY_ACK,
    PROTOCOL_FEATURES,
    REPLY,
    U64,
    VERSION,
    VERSION_MASK,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VRING_ADDRESS,
    VRING_INDEX_MASK,
    VRING_NO_FD,
    VRING_STATE,
    Request,
)


class Device(Protocol):
    """What a transport needs of a device."""

    @property
    def features(self) -> int:
        """Bits of the device and of its queues."""

    @property
    def queue_count(self) -> int:
        """How many queues it has."""

    @property
    def queue_names(self) -> Sequence[str]:
        """Of all of its queues, in their order; for messages."""

    @property
    def config(self) -> bytes:
        """Its configuration space."""

    def start(self, index: int, queue: Virtqueue) -> None:
        """A queue runs."""

    def stop(self, index: int) -> None:
        """A queue is about to be taken away."""


class Watch(Protocol):
    """Where kicks are waited for."""

    def watch(self, fd: int, callback: Callable[[int], None] | None) -> None:
        """Call back when the fd becomes readable."""

    def forget(self, fd: int) -> None:
        """No longer."""

    def retire(self, sock: socket.socket) -> None:
        """Forget and close."""


class _Addresses(NamedTuple):
    """Of a ring, in the front-end's address space."""

    descriptors: int
    used: int
    available: int


class _Ring:
    """What the front-end has said about a queue so far."""

    def __init__(self) -> None:
        self.size = 0
        self.addresses: _Addresses | None = None
        self.base = 0
        self.kick: int | None = None
        self.call: int | None = None
        self.enabled = False
        self.queue: Virtqueue | None = None

    def interrupt(self) -> None:
        """Signal the driver."""
        if self.call is None:
            return
        try:
            os.eventfd_write(self.call, 1)
        except BlockingIOError:
            pass  # full of signals already
        except OSError as error:
            raise ProtocolError(f"vhost-user: cannot signal the driver: {error}") from error


class VhostUser:
    """Serves one connection. ``on_readable`` reads what is there; ``close`` gives everything back.

    A peer that breaks the protocol raises ``ProtocolError``; after that only ``close`` is left.
    """

    def __init__(self, transport: socket.socket, device: Device, loop: Watch) -> None:
        transport.setblocking(False)
        self.ended = False
        """The front-end has closed the connection."""
        self._transport = transport
        self._device = device
        self._loop = loop
        self._features = 0
        self._offered_protocol = PROTOCOL_FEATURES if device.config else PROTOCOL_FEATURES & ~PROTOCOL_F_CONFIG
        self._protocol_features = 0
        self._memory: GuestMemory | None = None
        self._user_regions: list[tuple[int, int, int]] = []
        self._rings = [_Ring() for _ in range(device.queue_count)]
        self._head = b""
        self._payload = b""
        self._fds: list[int] = []

    # Messages

    def on_readable(self) -> None:
        """Answer all messages that are there."""
        while not self.ended and self._read():
            request, flags, _ = HEADER.unpack(self._head)
            payload, fds = self._payload, self._fds
            self._head, self._payload, self._fds = b"", b"", []
            try:
                self._answer(request, flags, payload, fds)
            finally:
                for fd in fds:  # handlers take out what they keep
                    os.close(fd)

    def _read(self) -> bool:
        """True once a whole message is there. Header and payload are read apart, for fds come with the header."""
        try:
            while len(self._head) < HEADER.size:
                data, ancillary, _, _ = self._transport.recvmsg(
                    HEADER.size - len(self._head),
                    socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize),
                    socket.MSG_CMSG_CLOEXEC,
                )
                self._collect(ancillary)
                if not data:
                    self.ended = True
                    return False
                self._head += data
            request, flags, size = HEADER.unpack(self._head)
            if flags & VERSION_MASK != VERSION or flags & REPLY:
                raise ProtocolError(f"vhost-user: request {request}: flags {flags:#x}, expected a request of version 1")
            if size > MAX_PAYLOAD:
                raise ProtocolError(f"vhost-user: request {request}: {size} bytes, the limit is {MAX_PAYLOAD}")
            while len(self._payload) < size:
                data = self._transport.recv(size - len(self._payload))
                if not data:
                    self.ended = True
                    return False
                self._payload += data
        except BlockingIOError:
            return False
        except ConnectionError:
            self.ended = True
            return False
        return True

    def _collect(self, ancillary: Sequence[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds += fds

    def _answer(self, number: int, flags: int, payload: bytes, fds: list[int]) -> None:
        try:
            request = Request(number)
        except ValueError:
            raise ProtocolError(f"vhost-user: request {number} was not offered") from None
        reply = self._handle(request, payload, fds)
        if reply is None and flags & NEED_REPLY and self._protocol_features & PROTOCOL_F_REPLY_ACK:
            reply = U64.pack(0)
        if reply is None:
            return
        message = HEADER.pack(request, VERSION | REPLY, len(reply)) + reply
        try:
            sent = self._transport.send(message)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            self.ended = True
            return
        if sent < len(message):
            raise ProtocolError("vhost-user: the front-end does not read its replies")

    def _handle(self, request: Request, payload: bytes, fds: list[int]) -> bytes | None:
        """Do one request; returns the reply of those that have one."""
        match request:
            case Request.GET_FEATURES:
                return U64.pack(self._device.features | VHOST_USER_F_PROTOCOL_FEATURES)
            case Request.SET_FEATURES:
                self._features = self._offered(request, payload, self._device.features | VHOST_USER_F_PROTOCOL_FEATURES)
            case Request.GET_PROTOCOL_FEATURES:
                return U64.pack(self._offered_protocol)
            case Request.SET_PROTOCOL_FEATURES:
                self._protocol_features = self._offered(request, payload, self._offered_protocol)
            case Request.GET_QUEUE_NUM:
                return U64.pack(self._device.queue_count)
            case Request.SET_OWNER | Request.RESET_OWNER:
                pass
            case Request.SET_MEM_TABLE:
                self._set_memory(payload, fds)
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                self._set_eventfd(request, payload, fds)
            case Request.SET_VRING_ADDR:
                index, _, descriptors, used, available, _ = self._unpack(request, VRING_ADDRESS, payload)
                ring = self._ring(request, index)
                self._stop(index)
                ring.addresses = _Addresses(descriptors, used, available)
                self._start(index)
            case Request.SET_VRING_NUM | Request.SET_VRING_BASE | Request.SET_VRING_ENABLE | Request.GET_VRING_BASE:
                return self._vring_state(request, *self._unpack(request, VRING_STATE, payload))
            case Request.GET_CONFIG:
                return self._config(payload)
        return None

    def _unpack(self, request: Request, layout: Struct, payload: bytes) -> tuple[int, ...]:
        if len(payload) != layout.size:
            raise ProtocolError(f"vhost-user: {request.name}: {len(payload)} bytes, expected {layout.size}")
        return layout.unpack(payload)

    def _offered(self, request: Request, payload: bytes, offered: int) -> int:
        (features,) = self._unpack(request, U64, payload)
        if features & ~offered:
            raise ProtocolError(f"vhost-user: {request.name}: {features:#x} has bits that {offered:#x} did not offer")
        return features

    def _ring(self, request: Request, index: int) -> _Ring:
        if index >= len(self._rings):
            raise ProtocolError(f"vhost-user: {request.name}: queue {index}, the device has {len(self._rings)}")
        return self._rings[index]

    def _config(self, payload: bytes) -> bytes:
        if len(payload) < CONFIG_HEADER.size:
            raise ProtocolError(f"vhost-user: GET_CONFIG: {len(payload)} bytes, expected {CONFIG_HEADER.size} and more")
        offset, size, flags = CONFIG_HEADER.unpack_from(payload)
        if size > MAX_CONFIG or size != len(payload) - CONFIG_HEADER.size or offset + size > len(self._device.config):
            return b""  # how this request reports an error
        return CONFIG_HEADER.pack(offset, size, flags) + self._device.config[offset : offset + size]

    # Memory

    def _set_memory(self, payload: bytes, fds: list[int]) -> None:
        if len(payload) < MEMORY_TABLE.size:
            raise ProtocolError(
                f"vhost-user: SET_MEM_TABLE: {len(payload)} bytes, expected {MEMORY_TABLE.size} and more"
            )
        count, _ = MEMORY_TABLE.unpack_from(payload)
        expected = MEMORY_TABLE.size + count * MEMORY_REGION.size
        if count != len(fds) or len(payload) != expected:
            raise ProtocolError(
                f"vhost-user: SET_MEM_TABLE: {count} regions in {len(payload)} bytes with {len(fds)} file descriptors"
            )
        for index in range(len(self._rings)):
            self._stop(index)
        regions = []
        self._user_regions = []
        for fd, (gpa, size, user, offset) in zip(
            fds, MEMORY_REGION.iter_unpack(payload[MEMORY_TABLE.size :]), strict=True
        ):
            regions.append(MemoryRegion.map(fd, gpa=gpa, size=size, offset=offset))
            self._user_regions.append((user, size, gpa))
        self._memory = GuestMemory(regions)
        for index in range(len(self._rings)):
            self._start(index)

    def _view(self, memory: GuestMemory, user: int, length: int) -> memoryview:
        """Memory by its address in the front-end."""
        for start, size, gpa in self._user_regions:
            if start <= user and user + length <= start + size:
                return memory.view(gpa + user - start, length)
        raise ProtocolError(f"vhost-user: {length:#x} bytes of ring at {user:#018x} are not in guest memory")

    # Rings

    def _set_eventfd(self, request: Request, payload: bytes, fds: list[int]) -> None:
        (value,) = self._unpack(request, U64, payload)
        ring = self._ring(request, value & VRING_INDEX_MASK)
        # Without a kick to wait for the rings would have to be polled, which is not offered.
        wanted = 0 if value & VRING_NO_FD and request is not Request.SET_VRING_KICK else 1
        if len(fds) != wanted:
            raise ProtocolError(f"vhost-user: {request.name}: {len(fds)} file descriptors, expected {wanted}")
        if request is Request.SET_VRING_ERR:
            return  # a broken queue is silent: QEMU would only print it
        fd = fds.pop() if fds else None
        if fd is not None:
            os.set_blocking(fd, False)
        if request is Request.SET_VRING_CALL:
            if ring.call is not None:
                os.close(ring.call)
            ring.call = fd
            if ring.queue is not None:
                ring.interrupt()  # a signal to the old one may have been missed
            return
        self._stop(value & VRING_INDEX_MASK)
        self._close_kick(ring)
        ring.kick = fd
        self._start(value & VRING_INDEX_MASK)

    def _vring_state(self, request: Request, index: int, number: int) -> bytes | None:
        ring = self._ring(request, index)
        if request is Request.SET_VRING_ENABLE and ring.enabled == (number != 0):
            return None
        self._stop(index)
        match request:
            case Request.SET_VRING_NUM:
                if not 0 < number <= MAX_SIZE or number & (number - 1):
                    raise ProtocolError(
                        f"vhost-user: SET_VRING_NUM: size {number} is not a power of two up to {MAX_SIZE}"
                    )
                ring.size = number
            case Request.SET_VRING_BASE:
                ring.base = number & 0xFFFF
            case Request.SET_VRING_ENABLE:
                ring.enabled = number != 0
            case _:
                self._close_kick(ring)  # the ring rests until it gets a new one
                return VRING_STATE.pack(index, ring.base)
        self._start(index)
        return None

    def _start(self, index: int) -> None:
        """Run a ring of which everything is known."""
        ring = self._rings[index]
        enabled = ring.enabled or not self._features & VHOST_USER_F_PROTOCOL_FEATURES
        if not (enabled and ring.size and ring.addresses and ring.kick is not None and self._memory):
            return
        ring.queue = Virtqueue(
            self._device.queue_names[index],
            self._memory,
            ring.size,
            descriptors=self._view(self._memory, ring.addresses.descriptors, descriptors_size(ring.size)),
            available=self._view(self._memory, ring.addresses.available, available_size(ring.size)),
            used=self._view(self._memory, ring.addresses.used, used_size(ring.size)),
            base=ring.base,
            indirect=bool(self._features & VIRTIO_F_INDIRECT_DESC),
            interrupt=ring.interrupt,
        )
        try:
            self._loop.watch(ring.kick, None)  # being woken is enough: the device looks at its queues
        except OSError as error:
            ring.queue = None
            raise ProtocolError(f"vhost-user: cannot wait for the driver: {error}") from error
        self._device.start(index, ring.queue)

    def _stop(self, index: int) -> None:
        ring = self._rings[index]
        if ring.queue is None:
            return
        self._device.stop(index)
        ring.base = ring.queue.base
        ring.queue = None
        if ring.kick is not None:
            self._loop.forget(ring.kick)

    def _close_kick(self, ring: _Ring) -> None:
        if ring.kick is not None:
            os.close(ring.kick)
            ring.kick = None

    def close(self) -> None:
        """Stop the rings, forget the memory, close everything."""
        for index, ring in enumerate(self._rings):
            self._stop(index)
            self._close_kick(ring)
            if ring.call is not None:
                os.close(ring.call)
                ring.call = None
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._memory = None
        self._loop.retire(self._transport)
