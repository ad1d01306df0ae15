# SPDX-License-Identifier: Apache-2.0
"""Split virtqueue, the device's side.

Source: virtio 1.2 §2.7. Three arrays in guest memory, little-endian: descriptors {addr u64, len u32, flags u16,
next u16}; the available ring {flags u16, idx u16, ring u16[size]}, written by the driver; the used ring {flags u16,
idx u16, ring {id u32, len u32}[size]}, written by us. With INDIRECT, a descriptor may stand for a table of descriptors
elsewhere. EVENT_IDX is not offered: the flags tell either side when the other looks by itself, and Linux's vsock driver
gains nothing from more (docs/vsock.md).

The driver is not trusted: whatever breaks the rules raises ``VirtqueueError``, and the queue is not to be used again.
Order of stores: CPython stores in program order and x86 keeps it, so an element is visible before the index that
announces it. A load may overtake an earlier store, so ``_fence`` stands between what we announce and the look after
which we believe that the driver has nothing, or needs no word.
Indices are read and written by native two-byte accesses (``memoryview.cast("H")``): ``struct`` with an
explicit byte order goes byte by byte, and the other side could see half an index.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from struct import Struct
from typing import NamedTuple

from enclavekit.errors import VirtqueueError
from enclavekit.virtio.memory import GuestMemory

MAX_SIZE = 32768

DESCRIPTOR = Struct(
    "<"  #  little-endian, no padding
    "Q"  # 0x0 addr, guest physical
    "I"  # 0x8 len, bytes
    "H"  # 0xc flags
    "H"  # 0xe next, index
)
DESCRIPTOR_SIZE = DESCRIPTOR.size
TWO_DESCRIPTORS = Struct(
    "<"
    "QIHH"  # 0x00 the first
    "QIHH"  # 0x10 the second
)
USED_ELEMENT = Struct(
    "<"
    "I"  # 0x0 id, index of the chain's head
    "I"  # 0x4 len, bytes written into the chain
)
USED_ELEMENT_SIZE = USED_ELEMENT.size

VIRTQ_DESC_F_NEXT = 1
VIRTQ_DESC_F_WRITE = 2
VIRTQ_DESC_F_INDIRECT = 4
VIRTIO_F_INDIRECT_DESC = 1 << 28

VIRTQ_AVAIL_F_NO_INTERRUPT = 1
VIRTQ_USED_F_NO_NOTIFY = 1

RING_HEADER_SIZE = 4
"""flags and idx, before either ring's elements."""

Parts = tuple[list[memoryview], list[memoryview]]
"""Of a chain: to read, and to write."""


def descriptors_size(size: int) -> int:
    """Bytes of the descriptor table of a queue of ``size``."""
    return DESCRIPTOR_SIZE * size


def available_size(size: int) -> int:
    """Bytes of the available ring."""
    return RING_HEADER_SIZE + 2 * size


def used_size(size: int) -> int:
    """Bytes of the used ring."""
    return RING_HEADER_SIZE + USED_ELEMENT_SIZE * size


class Chain(NamedTuple):
    """A request of the driver: parts to read, then parts to write, as views of guest memory."""

    head: int
    readable: list[memoryview]
    writable: list[memoryview]


class Virtqueue:
    """One running queue over the three arrays' memory; ``base`` is where the available ring is read on from."""

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        size: int,
        *,
        descriptors: memoryview,
        available: memoryview,
        used: memoryview,
        base: int = 0,
        indirect: bool = False,
        interrupt: Callable[[], None],
    ) -> None:
        self.name = name
        self.size = size
        self._memory = memory
        self._descriptors = descriptors[: descriptors_size(size)]
        self._available = available[: available_size(size)].cast("H")
        self._used = used[: used_size(size)]
        self._used_index = self._used[:RING_HEADER_SIZE].cast("H")
        self._longest_table = descriptors_size(size) if indirect else 0
        self._interrupt = interrupt
        self._next = base
        self._next_used = self._used_index[1]
        self._kicks = True
        self._busy = False
        """There was something the last time that we looked."""
        self._used_index[0] = 0
        self._pending = 0
        self._added = False
        self._lock = threading.Lock()

    @property
    def base(self) -> int:
        """Index of the next available entry, modulo 2^16: where a later run would go on."""
        return self._next

    def peek(self) -> bool:
        """Whether there is a chain. The driver is not to kick us until ``pop`` finds none."""
        if self._kicks:
            self._kicks = False
            self._used_index[0] = VIRTQ_USED_F_NO_NOTIFY
        return self._available[1] != self._next

    def pop(self) -> Chain | None:
        """The next chain, or None where the driver has made none available: it kicks us when there is one."""
        if not self._pending and not self._look():
            return None
        position = self._next
        head = self._available[2 + position % self.size]
        self._next = (position + 1) & 0xFFFF
        self._pending -= 1
        parts: Parts | None = None
        if head < self.size:
            address, length, flags, _ = DESCRIPTOR.unpack_from(self._descriptors, head * DESCRIPTOR_SIZE)
            # Mostly it is one descriptor, or a table of two, in the memory where most is.
            gpa, size, memory = self._memory.main
            start = address - gpa
            if not 0 <= start < (end := start + length) <= size:
                pass
            elif not flags & ~VIRTQ_DESC_F_WRITE:
                part = [memory[start:end]]
                parts = ([], part) if flags else (part, [])
            elif flags == VIRTQ_DESC_F_INDIRECT and length == TWO_DESCRIPTORS.size <= self._longest_table:
                parts = self._two(start)
        if parts is None:
            parts = self._walk(head, self._descriptors, self.size, head)
        return tuple.__new__(Chain, (head, *parts))  # a NamedTuple's own is slow

    def _two(self, at: int) -> Parts | None:
        """Of the table at this place; None unless both descriptors are as usual."""
        gpa, size, memory = self._memory.main
        address, length, flags, following, address_2, length_2, flags_2, _ = TWO_DESCRIPTORS.unpack_from(memory, at)
        start, start_2 = address - gpa, address_2 - gpa
        end, end_2 = start + length, start_2 + length_2
        if (
            flags_2 & ~VIRTQ_DESC_F_WRITE
            or flags != flags_2 | VIRTQ_DESC_F_NEXT
            or following != 1
            or not 0 <= start < end <= size
            or not 0 <= start_2 < end_2 <= size
        ):
            return None
        parts = [memory[start:end], memory[start_2:end_2]]
        return ([], parts) if flags_2 else (parts, [])

    def _walk(self, head: int, table: memoryview | bytes, entries: int, index: int) -> Parts:
        """From a table's descriptor ``index`` to the end of the chain."""
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        for _ in range(self.size + 1):  # one may stand for others
            if index >= entries:
                raise VirtqueueError(f"{self.name} queue: descriptor {index} is not in a table of {entries}")
            address, length, flags, following = DESCRIPTOR.unpack_from(table, index * DESCRIPTOR_SIZE)
            if flags & VIRTQ_DESC_F_INDIRECT:
                if table is not self._descriptors:
                    raise VirtqueueError(f"{self.name} queue: descriptor {index} of a table is indirect itself")
                table = self._table(index, address, length, flags)
                entries, index = length // DESCRIPTOR_SIZE, 0
                continue
            if not length:
                raise VirtqueueError(f"{self.name} queue: descriptor {index} is empty")
            part = self._memory.view(address, length)
            if flags & VIRTQ_DESC_F_WRITE:
                writable.append(part)
            elif writable:
                raise VirtqueueError(f"{self.name} queue: descriptor {index} is readable after writable ones")
            else:
                readable.append(part)
            if not flags & VIRTQ_DESC_F_NEXT:
                return readable, writable
            index = following
        raise VirtqueueError(f"{self.name} queue: the chain from descriptor {head} has no end")

    def _look(self) -> bool:
        """See what has become available. A driver that adds more while we work is not to kick us."""
        pending = (self._available[1] - self._next) & 0xFFFF
        if not pending:
            self._busy = False
            if self._kicks:
                return False
            self._kicks = True
            self._used_index[0] = 0
            self._fence()  # what came before the driver saw this, we see
            pending = (self._available[1] - self._next) & 0xFFFF
        elif self._busy and self._kicks:
            self._kicks = False
            self._used_index[0] = VIRTQ_USED_F_NO_NOTIFY
        if pending > self.size:
            raise VirtqueueError(f"{self.name} queue: {pending} chains available in a ring of {self.size}")
        self._pending = pending
        self._busy = pending > 0
        return self._busy

    def _table(self, index: int, address: int, length: int, flags: int) -> bytes:
        """A copy of what an indirect descriptor stands for: at most as many as the queue has, the chain's last part."""
        if flags & VIRTQ_DESC_F_NEXT or not 0 < length <= self._longest_table or length % DESCRIPTOR_SIZE:
            where = f"{self.name} queue: descriptor {index}"
            if not self._longest_table:
                raise VirtqueueError(f"{where} is indirect, which was not agreed on")
            if flags & VIRTQ_DESC_F_NEXT:
                raise VirtqueueError(f"{where} is indirect and has a next one")
            raise VirtqueueError(f"{where}: table of {length} bytes, expected 1 to {self.size} descriptors")
        return self._memory.view(address, length).tobytes()

    def put_back(self, count: int) -> None:
        """Forget the last ``count`` chains that were popped and not pushed: they are available again."""
        self._next = (self._next - count) & 0xFFFF
        self._pending = 0

    def push(self, head: int, written: int) -> None:
        """Give a chain back as used, with ``written`` bytes in its writable parts."""
        index = self._next_used
        USED_ELEMENT.pack_into(self._used, RING_HEADER_SIZE + index % self.size * USED_ELEMENT_SIZE, head, written)
        self._next_used = self._used_index[1] = (index + 1) & 0xFFFF
        self._added = True

    def push_read(self, heads: Iterable[int]) -> None:
        """Give chains back in which nothing was written, all at once."""
        index = self._next_used
        for head in heads:
            USED_ELEMENT.pack_into(self._used, RING_HEADER_SIZE + index % self.size * USED_ELEMENT_SIZE, head, 0)
            index = (index + 1) & 0xFFFF
        self._next_used = self._used_index[1] = index
        self._added = True

    def signal(self) -> None:
        """Tell the driver of what was pushed since the last time, unless it looks by itself."""
        if self._added:
            self._added = False
            if self._available[0] & VIRTQ_AVAIL_F_NO_INTERRUPT:
                self._fence()  # a driver that stops polling clears its flag, then looks at our index once more
                if self._available[0] & VIRTQ_AVAIL_F_NO_INTERRUPT:
                    return
            self._interrupt()

    def _fence(self) -> None:
        """No load after this happens before a store ahead of it.

        Taking a lock that is free is an atomic read-modify-write, a full barrier on x86, where alone devices run.
        """
        with self._lock:
            pass
