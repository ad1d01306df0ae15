# SPDX-License-Identifier: Apache-2.0
"""Guest memory as a device sees it: regions of guest physical addresses over host buffers.

Source: virtio 1.2 §2.7 (addresses in descriptors are guest physical), QEMU docs/interop/vhost-user.rst (memory
regions description). The guest writes here at any time: whoever parses copies first, then looks.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from enclavekit.errors import ProtocolError, VirtqueueError

ADDRESS_END = 1 << 64


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """``buffer`` is what the guest sees from ``gpa`` on. A view keeps its mapping alive."""

    gpa: int
    buffer: memoryview

    @classmethod
    def map(cls, fd: int, *, gpa: int, size: int, offset: int) -> MemoryRegion:
        """Map ``size`` bytes of a file from ``offset`` on, shared. The fd may be closed afterwards."""
        if not 0 < size < ADDRESS_END - max(gpa, offset):
            raise ProtocolError(f"memory region at {gpa:#018x}: size {size:#x} is not within the address space")
        lead = offset % mmap.ALLOCATIONGRANULARITY
        try:
            mapping = mmap.mmap(fd, lead + size, offset=offset - lead)
        except (OSError, ValueError, OverflowError) as error:  # ValueError: the file is shorter
            raise ProtocolError(f"memory region at {gpa:#018x}: cannot map {size:#x} bytes: {error}") from error
        return cls(gpa, memoryview(mapping)[lead:])


class GuestMemory:
    """Regions that do not overlap. There is no close: the last view that goes takes the mapping along."""

    def __init__(self, regions: Iterable[MemoryRegion]) -> None:
        ordered = sorted(regions, key=lambda region: region.gpa)
        for below, above in pairwise(ordered):
            if below.gpa + len(below.buffer) > above.gpa:
                raise ProtocolError(f"memory regions at {below.gpa:#018x} and {above.gpa:#018x} overlap")
        # The largest first: that is where buffers are.
        ordered.sort(key=lambda region: len(region.buffer), reverse=True)
        self._regions = [(region.gpa, region.gpa + len(region.buffer), region.buffer) for region in ordered]
        largest = ordered[0] if ordered else MemoryRegion(0, memoryview(b""))
        self.main = (largest.gpa, len(largest.buffer), largest.buffer)
        """The largest region: its address, size and buffer, for those who look up much."""

    def view(self, gpa: int, length: int) -> memoryview:
        """The ``length`` bytes at ``gpa``, writable, all in one region."""
        end = gpa + length
        for start, stop, buffer in self._regions:
            if start <= gpa and end <= stop:
                return buffer[gpa - start : end - start]
        raise VirtqueueError(f"guest memory: {length:#x} bytes at {gpa:#018x} are not in one region")
