# SPDX-License-Identifier: Apache-2.0
"""Split virtqueue, the device's side (virtio 1.2 §2.7), over memory that a hostile driver writes at any time.

A descriptor table (16 bytes each), the driver's avail ring, the device's used ring. Whatever breaks the rules (a loop,
an index or address out of range, a readable descriptor after a writable one) is a ``VirtqueueError``: the device is
broken until it is reset, and nothing else is touched. EVENT_IDX and INDIRECT are not offered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from struct import Struct

from enclavekit.errors import VirtqueueError
from enclavekit.virtio.memory import GuestMemory

DESCRIPTOR = Struct(
    "<"  #  little-endian, no padding
    "Q"  # 0x0 guest physical address
    "I"  # 0x8 length, bytes
    "H"  # 0xc flags
    "H"  # 0xe next descriptor, with VIRTQ_DESC_F_NEXT
)
U16 = Struct("<H")
USED_ELEMENT = Struct("<II")  # id of the chain's first descriptor, bytes written
RING_INDEX = 2
RING_ENTRIES = 4

VIRTQ_DESC_F_NEXT = 1
VIRTQ_DESC_F_WRITE = 2
VIRTQ_DESC_F_INDIRECT = 4

MAX_QUEUE_SIZE = 32768
MAX_CHAIN_BYTES = 1 << 20
"""More than any driver puts into one chain: Linux's vsock sends at most 64 KiB and a header."""


def table_size(size: int) -> int:
    """Bytes of a descriptor table for ``size`` descriptors."""
    return DESCRIPTOR.size * size


def avail_size(size: int) -> int:
    """Bytes of an avail ring: flags, idx, entries."""
    return RING_ENTRIES + 2 * size


def used_size(size: int) -> int:
    """Bytes of a used ring: flags, idx, elements."""
    return RING_ENTRIES + USED_ELEMENT.size * size


@dataclass(slots=True)
class Chain:
    """One descriptor chain: what the device may read, and where it may write."""

    head: int
    readable: list[memoryview] = field(default_factory=list)
    writable: list[memoryview] = field(default_factory=list)


class Queue:
    """One virtqueue that a driver has set up. The three parts are shared with the guest."""

    def __init__(self, memory: GuestMemory, size: int, table: memoryview, avail: memoryview, used: memoryview) -> None:
        if not 1 <= size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise VirtqueueError(f"queue size {size}: expected a power of two up to {MAX_QUEUE_SIZE}")
        self._memory = memory
        self.size = size
        self._table, self._avail, self._used = table, avail, used
        self.last_avail = 0
        """The avail index up to which chains were taken, modulo 2^16."""
        self._used_index = U16.unpack_from(used, RING_INDEX)[0]

    def available(self) -> int:
        """Chains that the driver has put there and the device has not taken."""
        count: int = (U16.unpack_from(self._avail, RING_INDEX)[0] - self.last_avail) & 0xFFFF
        if count > self.size:
            raise VirtqueueError(f"avail index: {count} chains, expected at most {self.size}")
        return count

    def pop(self) -> Chain | None:
        """The next chain, all of it checked; None when there is none."""
        if not self.available():
            return None
        slot = self.last_avail & (self.size - 1)
        head = U16.unpack_from(self._avail, RING_ENTRIES + 2 * slot)[0]
        chain = Chain(head)
        index, total = head, 0
        for _ in range(self.size):
            if index >= self.size:
                raise VirtqueueError(f"descriptor {index}: expected less than {self.size}")
            address, length, flags, following = DESCRIPTOR.unpack_from(self._table, DESCRIPTOR.size * index)
            if flags & VIRTQ_DESC_F_INDIRECT:
                raise VirtqueueError(f"descriptor {index}: indirect, which was not offered")
            total += length
            if total > MAX_CHAIN_BYTES:
                raise VirtqueueError(f"descriptor {index}: chain of more than {MAX_CHAIN_BYTES} bytes")
            if flags & VIRTQ_DESC_F_WRITE:
                chain.writable.append(self._memory.slice(address, length))
            elif chain.writable:
                raise VirtqueueError(f"descriptor {index}: readable after a writable one")
            else:
                chain.readable.append(self._memory.slice(address, length))
            if not flags & VIRTQ_DESC_F_NEXT:
                self.last_avail = (self.last_avail + 1) & 0xFFFF
                return chain
            index = following
        raise VirtqueueError(f"descriptor {head}: chain of more than {self.size} descriptors, a loop")

    def push(self, head: int, written: int) -> None:
        """Give a chain back, with ``written`` bytes in its writable part: the element first, then the index."""
        slot = self._used_index & (self.size - 1)
        USED_ELEMENT.pack_into(self._used, RING_ENTRIES + USED_ELEMENT.size * slot, head, written)
        self._used_index = (self._used_index + 1) & 0xFFFF
        U16.pack_into(self._used, RING_INDEX, self._used_index)
