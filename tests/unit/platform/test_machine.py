# SPDX-License-Identifier: Apache-2.0
"""Memory map and device windows against the figures of QEMU's microvm."""

from __future__ import annotations

import pytest

from enclavekit.platform.machine import GIB, MIB, E820Type, memory_map, microvm_windows


def test_windows_are_filled_from_the_top() -> None:
    assert [window.cmdline() for window in microvm_windows(2)] == [
        "virtio_mmio.device=512@0xfeb00e00:12",
        "virtio_mmio.device=512@0xfeb00c00:11",
    ]


def test_only_eight_windows() -> None:
    assert len(microvm_windows(8)) == 8
    with pytest.raises(ValueError, match="microvm has 8 virtio transports, not 9"):
        microvm_windows(9)


def test_small_memory_is_one_range_above_the_first_mib() -> None:
    entries = memory_map(256 * MIB)
    assert [(entry.address, entry.address + entry.size, entry.type) for entry in entries] == [
        (0, 0x9FC00, E820Type.RAM),
        (0x9FC00, MIB, E820Type.RESERVED),
        (MIB, 256 * MIB, E820Type.RAM),
    ]


def test_memory_above_three_gib_goes_on_at_four() -> None:
    *_, low, high = memory_map(5 * GIB)
    assert low.address + low.size == 3 * GIB
    assert (high.address, high.size) == (4 * GIB, 2 * GIB)


@pytest.mark.parametrize("size", [64 * MIB, 3 * GIB, 3 * GIB + MIB, 16 * GIB])
def test_ram_adds_up(size: int) -> None:
    ram = sum(entry.size for entry in memory_map(size) if entry.type is E820Type.RAM)
    assert ram == size - (MIB - 0x9FC00)
