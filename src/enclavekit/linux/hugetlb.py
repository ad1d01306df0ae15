# SPDX-License-Identifier: Apache-2.0
"""One huge page of hugetlb in this process (mmap(2), linux: Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

import mmap

MAP_HUGETLB = 0x40000
MAP_HUGE_SHIFT = 26


def map_page(size: int) -> mmap.mmap:
    """A page of ``size`` bytes, reserved for us by the kernel. ``OSError`` when none is free."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB | (size.bit_length() - 1) << MAP_HUGE_SHIFT
    return mmap.mmap(-1, size, flags)
