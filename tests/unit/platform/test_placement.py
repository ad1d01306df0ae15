# SPDX-License-Identifier: Apache-2.0
"""How much memory an image needs, and what is said when it is too little."""

from __future__ import annotations

import pytest

from enclavekit.codec.bzimage import BzImage
from enclavekit.errors import ImageTooLargeError, LaunchError, NotEnoughMemoryError
from enclavekit.platform.machine import GIB, MIB
from enclavekit.platform.placement import choose_memory, choose_nitro_memory, needed_memory, needed_nitro_memory

KERNEL = BzImage(
    setup_sects=4, version=0x20F, loadflags=1, code32_start=0x100000, initrd_addr_max=0x7FFFFFFF,
    kernel_alignment=2 * MIB, relocatable=True, xloadflags=3, cmdline_size=2047, payload_offset=0, payload_length=0,
    pref_address=16 * MIB, init_size=60 * MIB, banner="",
)  # fmt: skip


def test_a_small_image_needs_its_kernels_room() -> None:
    assert needed_memory(KERNEL, 4 * MIB, MIB) == (16 + 60 + 1 + 32) * MIB


def test_a_large_ramdisk_is_there_twice() -> None:
    assert needed_memory(KERNEL, 1 * GIB, 1 * GIB) == (8 + 1024 + 60 + 1024 + 32) * MIB


def test_an_image_that_reaches_the_hole_is_too_large() -> None:
    with pytest.raises(ImageTooLargeError) as caught:
        needed_memory(KERNEL, 3 * GIB, 3 * GIB)
    assert str(caught.value) == (
        "image of 3221225472 bytes: with its kernel it ends at 0xc4400000, expected at most 0xc0000000: "
        "a local machine's memory has a hole there"
    )


def test_auto_is_comfortable() -> None:
    assert choose_memory(50 * MIB, None) == 256 * MIB
    assert choose_memory(1000 * MIB, None) == 1500 * MIB


def test_too_little_says_how_much() -> None:
    with pytest.raises(NotEnoughMemoryError) as caught:
        choose_memory(100 * MIB, 64 * MIB)
    assert str(caught.value) == "memory: got 64 MiB, this image needs at least 100 MiB"
    assert caught.value.hint == "--memory 100M, or --memory auto"


@pytest.mark.parametrize("wanted", [200 * MIB + 1, 65 * GIB])
def test_odd_sizes_are_refused(wanted: int) -> None:
    with pytest.raises(LaunchError, match="expected whole MiB up to 64 GiB"):
        choose_memory(100 * MIB, wanted)


def test_a_real_enclave_has_no_hole_and_nitro_clis_size() -> None:
    assert needed_nitro_memory(1) == 64 * MIB
    assert needed_nitro_memory(4 * GIB) == 4 * GIB + 8 * MIB
    assert choose_nitro_memory(1, None) == 64 * MIB
    assert choose_nitro_memory(4 * GIB, None) == 16 * GIB
    assert choose_nitro_memory(1, 500 * GIB) == 500 * GIB
    with pytest.raises(NotEnoughMemoryError) as caught:
        choose_nitro_memory(100 * MIB, 100 * MIB)
    assert str(caught.value) == "memory: got 100 MiB, this image needs at least 108 MiB"
