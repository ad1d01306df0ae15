# SPDX-License-Identifier: Apache-2.0
"""Guest memory before the start, by guest physical addresses: what a host lays down there goes through this.

Addresses are those of RAM below 4 GiB, where an address is the offset in the memory as donated.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from enclavekit.errors import LaunchError

COPY_SIZE = 1 << 20


class Buffer(Protocol):
    """A carrier's memory region: a writable buffer, and where it begins."""

    @property
    def offset(self) -> int:
        """In bytes."""

    @property
    def buffer(self) -> memoryview:
        """The bytes themselves."""


class GuestMemory:
    """Regions in order, without gaps, as one; only the first ``end`` bytes of them. LaunchError for what is outside."""

    def __init__(self, regions: Sequence[Buffer], end: int) -> None:
        self._regions = regions
        self._end = end

    def _views(self, address: int, size: int) -> Iterator[memoryview]:
        if address < 0 or size < 0 or address + size > self._end:
            raise LaunchError(f"memory: 0x{size:x} bytes at 0x{address:x}, have 0x{self._end:x}")
        for region in self._regions:
            start = max(address - region.offset, 0)
            if size and start < len(region.buffer):
                view = region.buffer[start : start + size]
                yield view
                address, size = address + len(view), size - len(view)

    def write(self, address: int, data: bytes) -> None:
        """Put bytes there."""
        position = 0
        for view in self._views(address, len(data)):
            view[:] = data[position : position + len(view)]
            position += len(view)

    def read(self, address: int, size: int) -> bytes:
        """What is there."""
        return b"".join(bytes(view) for view in self._views(address, size))

    def chunks(self, address: int, size: int) -> Iterator[bytes]:
        """The same in pieces."""
        for start in range(address, address + size, COPY_SIZE):
            yield self.read(start, min(COPY_SIZE, address + size - start))

    def write_chunks(self, address: int, chunks: Iterable[bytes]) -> None:
        """Pieces, one behind the other; also of this memory, when they move down."""
        for chunk in chunks:
            self.write(address, chunk)
            address += len(chunk)


class MemoryFile(io.BytesIO):
    """A range of guest memory, as what reads files takes it."""

    def __init__(self, memory: GuestMemory, address: int, size: int) -> None:
        super().__init__()
        self._memory, self._address, self._size, self._position = memory, address, size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """From the start, here, or the end."""
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """At most so many bytes."""
        left = max(self._size - self._position, 0)
        data = self._memory.read(self._address + self._position, left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data
