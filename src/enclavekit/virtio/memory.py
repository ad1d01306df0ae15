# SPDX-License-Identifier: Apache-2.0
"""Guest memory as a device sees it: regions of guest physical addresses over shared mappings.

Every address and length comes from a hostile guest; nothing outside a region is ever touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from enclavekit.errors import VirtqueueError


@dataclass(frozen=True, slots=True)
class Region:
    """``buffer`` holds the guest physical addresses from ``address`` on."""

    address: int
    buffer: memoryview


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """All regions; they do not overlap."""

    regions: Sequence[Region]

    def slice(self, address: int, size: int) -> memoryview:
        """``size`` bytes at a guest physical address; they must lie in one region."""
        for region in self.regions:
            offset = address - region.address
            if offset >= 0 and offset + size <= len(region.buffer):
                return region.buffer[offset : offset + size]
        raise VirtqueueError(f"guest address 0x{address:x}: {size} bytes are not all in guest memory")
