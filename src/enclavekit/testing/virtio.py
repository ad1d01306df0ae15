# SPDX-License-Identifier: Apache-2.0
"""A virtio driver in Python, for tests of devices: drives virtqueues over plain memory as Linux does, or breaks them.

Source: virtio 1.2 §2.7 and §5.10.6. The memory is a buffer of the test's: a bytearray, or a mapping that is shared
with a vhost-user front-end.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from enclavekit.virtio.memory import GuestMemory, MemoryRegion
from enclavekit.virtio.queue import (
    DESCRIPTOR,
    RING_HEADER_SIZE,
    USED_ELEMENT,
    VIRTQ_AVAIL_F_NO_INTERRUPT,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_USED_F_NO_NOTIFY,
    Virtqueue,
    available_size,
    descriptors_size,
    used_size,
)
from enclavekit.virtio.vsock_packet import HEADER, PARENT_CID, TYPE_STREAM, Header, Op

ALIGNMENT = 16
TABLE_LENGTH = 8
"""Descriptors in the table that an indirect one stands for."""


class MockQueue:
    """A virtqueue of ``size`` at guest address ``gpa``. Descriptor ``i`` has a buffer of ``slot`` bytes of its own."""

    def __init__(self, name: str, memory: memoryview, gpa: int, *, size: int = 16, slot: int = 4096) -> None:
        self.name = name
        self.size = size
        self.interrupts = 0
        self.gpa = gpa
        self.available_gpa = gpa + descriptors_size(size)
        self.used_gpa = -(-(self.available_gpa + available_size(size)) // ALIGNMENT) * ALIGNMENT
        self._slots_gpa = -(-(self.used_gpa + used_size(size)) // ALIGNMENT) * ALIGNMENT
        self._tables_gpa = self._slots_gpa + size * slot
        self.end = self._tables_gpa + size * TABLE_LENGTH * DESCRIPTOR.size
        self._slot = slot
        self._memory = memory
        self._available_index = 0
        self._used_index = 0
        self.reset()

    def reset(self) -> None:
        """Empty, as a driver makes it before the device starts."""
        self._memory[self.gpa : self._slots_gpa] = bytes(self._slots_gpa - self.gpa)
        self._available_index = self._used_index = 0
        self._free = list(range(self.size))
        self._chains: dict[int, list[tuple[int, int, bool]]] = {}

    # As a good driver does

    def add(self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), *, indirect: bool = False) -> int:
        """Make a chain available, a descriptor a part; returns its head. Indirect: in a table of its own."""
        parts = [(len(data), False) for data in readable] + [(length, True) for length in writable]
        if len(parts) > len(self._free) or any(length > self._slot for length, _ in parts):
            raise ValueError(f"{self.name} queue: no room for a chain of {len(parts)} descriptors")
        chain = [(self._free.pop(0), length, write) for length, write in parts]
        for data, (index, _, _) in zip(readable, chain, strict=False):
            start = self.buffer_gpa(index)
            self._memory[start : start + len(data)] = data
        head = chain[0][0]
        table = self.table_gpa(head) if indirect else self.gpa
        places = list(range(len(chain))) if indirect else [index for index, _, _ in chain]
        for place, (index, length, write), following in zip(places, chain, [*places[1:], None], strict=True):
            flags = (VIRTQ_DESC_F_WRITE if write else 0) | (0 if following is None else VIRTQ_DESC_F_NEXT)
            self.describe(place, self.buffer_gpa(index), length, flags, following or 0, table=table)
        if indirect:
            self.describe(head, table, len(chain) * DESCRIPTOR.size, VIRTQ_DESC_F_INDIRECT)
        self._chains[head] = chain
        self.offer(head)
        return head

    def take_used(self) -> list[tuple[int, bytes]]:
        """What the device gave back since the last time: heads, and the bytes that it wrote."""
        done = []
        while self._used_index != self.used_index:
            position = self.used_gpa + RING_HEADER_SIZE + self._used_index % self.size * USED_ELEMENT.size
            head, written = USED_ELEMENT.unpack_from(self._memory, position)
            chain = self._chains.pop(head)
            self._free += [index for index, _, _ in chain]
            data = b"".join(
                bytes(self._memory[self.buffer_gpa(index) :][:length]) for index, length, write in chain if write
            )
            done.append((head, data[:written]))
            self._used_index = (self._used_index + 1) & 0xFFFF
        return done

    # Piece by piece, right or wrong

    def buffer_gpa(self, index: int) -> int:
        """Where the buffer of descriptor ``index`` is."""
        return self._slots_gpa + index * self._slot

    def table_gpa(self, head: int) -> int:
        """Where the table of an indirect descriptor is."""
        return self._tables_gpa + head * TABLE_LENGTH * DESCRIPTOR.size

    def describe(
        self, index: int, address: int, length: int, flags: int = 0, following: int = 0, *, table: int | None = None
    ) -> None:
        """Write a descriptor, into the queue's table or another one."""
        start = self.gpa if table is None else table
        DESCRIPTOR.pack_into(self._memory, start + index * DESCRIPTOR.size, address, length, flags, following)

    def offer(self, head: int) -> None:
        """Put a number into the available ring."""
        position = self.available_gpa + RING_HEADER_SIZE + 2 * (self._available_index % self.size)
        self._memory[position : position + 2] = head.to_bytes(2, "little")
        self._available_index = (self._available_index + 1) & 0xFFFF
        self.announce(self._available_index)

    def announce(self, index: int) -> None:
        """Write the available ring's idx."""
        self._memory[self.available_gpa + 2 : self.available_gpa + 4] = index.to_bytes(2, "little")

    def poll(self, polls: bool) -> None:
        """Say that interrupts are not wanted, or that they are."""
        flags = VIRTQ_AVAIL_F_NO_INTERRUPT if polls else 0
        self._memory[self.available_gpa : self.available_gpa + 2] = flags.to_bytes(2, "little")

    def wants_kicks(self) -> bool:
        """Whether the device asks to be told of new chains."""
        return not self._memory[self.used_gpa] & VIRTQ_USED_F_NO_NOTIFY

    @property
    def used_index(self) -> int:
        """The used ring's idx."""
        return int.from_bytes(self._memory[self.used_gpa + 2 : self.used_gpa + 4], "little")

    def for_device(self, memory: GuestMemory, base: int = 0, *, indirect: bool = True) -> Virtqueue:
        """The device's side of it; its interrupts are counted."""
        return Virtqueue(
            self.name,
            memory,
            self.size,
            descriptors=memory.view(self.gpa, descriptors_size(self.size)),
            available=memory.view(self.available_gpa, available_size(self.size)),
            used=memory.view(self.used_gpa, used_size(self.size)),
            base=base,
            indirect=indirect,
            interrupt=self._interrupt,
        )

    def _interrupt(self) -> None:
        self.interrupts += 1


class PacketLayout(Enum):
    """How a packet lies in descriptors: drivers differ, devices must not care."""

    ONE = "header and payload together"
    TWO = "header, then payload"
    MANY = "pieces, cut anywhere"
    INDIRECT = "header, then payload, in a table"

    def parts(self, size: int) -> list[int]:
        """Lengths of the descriptors of a packet of ``size`` bytes, header included."""
        match self:
            case PacketLayout.ONE:
                return [size]
            case PacketLayout.TWO | PacketLayout.INDIRECT:
                return [HEADER.size, size - HEADER.size] if size > HEADER.size else [size]
            case PacketLayout.MANY:
                lengths = [20, 20, 5]
                return [*lengths, size - sum(lengths)] if size > sum(lengths) else [20, size - 20]


class MockVsockDriver:
    """The vsock driver of guest ``cid``, over ``memory`` from guest address 0."""

    def __init__(
        self,
        memory: memoryview | bytearray,
        cid: int,
        *,
        size: int = 16,
        slot: int = 4096,
        layout: PacketLayout = PacketLayout.ONE,
    ) -> None:
        view = memoryview(memory)
        self.memory = GuestMemory([MemoryRegion(0, view)])
        self.cid = cid
        self.layout = layout
        self.slot = slot
        self.rx = MockQueue("rx", view, 0, size=size, slot=slot)
        self.tx = MockQueue("tx", view, self.rx.end, size=size, slot=slot)

    def fill_rx(self, count: int | None = None) -> None:
        """Give the device ``count`` rx buffers, or as many as fit."""
        parts = self.layout.parts(self.slot)
        for _ in range(self.rx.size // len(parts) if count is None else count):
            try:
                self.rx.add(writable=parts, indirect=self.layout is PacketLayout.INDIRECT)
            except ValueError:
                return

    def send(
        self,
        op: int,
        source: int,
        destination: int,
        payload: bytes = b"",
        *,
        cid: int = PARENT_CID,
        flags: int = 0,
        buf_alloc: int = 256 * 1024,
        fwd_cnt: int = 0,
        type: int = TYPE_STREAM,  # noqa: A002 - the field's name
    ) -> None:
        """Send a packet from port ``source`` to port ``destination`` of ``cid``."""
        self.send_raw(
            bytes(
                Header(
                    self.cid, cid, source, destination, len(payload), type, op, flags, buf_alloc, fwd_cnt & 0xFFFFFFFF
                )
            )
            + payload
        )

    def send_raw(self, packet: bytes) -> None:
        """Send any bytes."""
        self.tx.take_used()
        pieces, position = [], 0
        for length in self.layout.parts(len(packet)):
            pieces.append(packet[position : position + length])
            position += length
        self.tx.add(readable=pieces, indirect=self.layout is PacketLayout.INDIRECT)

    def receive(self, *, refill: bool = True) -> list[tuple[Header, bytes]]:
        """Packets that came, and new buffers in their place."""
        packets = [(Header.parse(data), data[HEADER.size :]) for _, data in self.rx.take_used()]
        if refill:
            self.fill_rx(len(packets))
        return packets

    def receive_ops(self) -> list[Op]:
        """Just what the packets were for."""
        return [Op(header.op) for header, _ in self.receive()]
