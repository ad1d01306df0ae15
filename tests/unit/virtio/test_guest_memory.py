# SPDX-License-Identifier: Apache-2.0
"""Guest memory: addresses, bounds, mappings."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from enclavekit.errors import ProtocolError, VirtqueueError
from enclavekit.virtio.memory import GuestMemory, MemoryRegion


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("test-memory", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * mmap.PAGESIZE)
    yield fd
    os.close(fd)


def two_regions() -> tuple[bytearray, bytearray, GuestMemory]:
    low, high = bytearray(0x1000), bytearray(0x2000)
    return (
        low,
        high,
        GuestMemory([MemoryRegion(0, memoryview(low)), MemoryRegion(0x10_0000, memoryview(high))]),
    )


def test_view_reaches_the_region_and_writes_through() -> None:
    low, high, memory = two_regions()
    memory.view(0xFF0, 0x10)[:] = b"x" * 16
    memory.view(0x10_1FFF, 1)[0] = 7
    assert low[0xFF0:] == b"x" * 16
    assert high[-1] == 7


@pytest.mark.parametrize(
    ("gpa", "length"),
    [(0xFF1, 0x10), (0x1000, 1), (0xF_FFFF, 2), (0x10_2000, 1), (0, 0x10_2000), ((1 << 64) - 1, 2)],
)
def test_views_outside_of_one_region_are_refused(gpa: int, length: int) -> None:
    with pytest.raises(VirtqueueError) as caught:
        two_regions()[2].view(gpa, length)
    assert str(caught.value) == f"guest memory: {length:#x} bytes at {gpa:#018x} are not in one region"


def test_overlapping_regions_are_refused() -> None:
    buffer = memoryview(bytearray(0x1000))
    with pytest.raises(ProtocolError) as caught:
        GuestMemory([MemoryRegion(0x1FFF, buffer), MemoryRegion(0x1000, buffer)])
    assert str(caught.value) == "memory regions at 0x0000000000001000 and 0x0000000000001fff overlap"


def test_regions_may_touch() -> None:
    buffer = memoryview(bytearray(0x1000))
    memory = GuestMemory([MemoryRegion(0x2000, buffer), MemoryRegion(0x1000, buffer)])
    assert len(memory.view(0x1000, 0x1000)) == 0x1000


@pytest.mark.parametrize("offset", [0, mmap.PAGESIZE, mmap.PAGESIZE + 0x10])
def test_a_mapping_shows_the_file_from_its_offset_on(memfd: int, offset: int) -> None:
    os.pwrite(memfd, b"here", offset)
    region = MemoryRegion.map(memfd, gpa=0x8000, size=0x800, offset=offset)
    assert region.gpa == 0x8000
    assert len(region.buffer) == 0x800
    assert bytes(region.buffer[:4]) == b"here"
    region.buffer[4:8] = b"back"
    assert os.pread(memfd, 8, offset) == b"hereback"


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:test-memory")


def test_the_last_view_takes_the_mapping_along(memfd: int) -> None:
    before = mappings()
    memory: GuestMemory | None = GuestMemory([MemoryRegion.map(memfd, gpa=0, size=0x1000, offset=0)])
    assert memory is not None
    view: memoryview | None = memory.view(0, 16)
    memory = None
    assert mappings() == before + 1
    view = None
    assert view is None
    assert mappings() == before


@pytest.mark.parametrize(
    ("gpa", "size", "offset"), [(0, 0, 0), (1, (1 << 64) - 1, 0), (0, 1, (1 << 64) - 1), ((1 << 64) - 1, 1, 0)]
)
def test_regions_outside_of_the_address_space_are_refused(memfd: int, gpa: int, size: int, offset: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        MemoryRegion.map(memfd, gpa=gpa, size=size, offset=offset)
    assert str(caught.value) == f"memory region at {gpa:#018x}: size {size:#x} is not within the address space"


@pytest.mark.parametrize(("size", "offset"), [(4 * mmap.PAGESIZE + 1, 0), (1, 1 << 62), (1 << 62, 0), (1 << 63, 1)])
def test_a_mapping_past_the_end_of_its_file_is_refused(memfd: int, size: int, offset: int) -> None:
    with pytest.raises(ProtocolError, match=f"^memory region at 0x0000000000001000: cannot map {size:#x} bytes: "):
        MemoryRegion.map(memfd, gpa=0x1000, size=size, offset=offset)
