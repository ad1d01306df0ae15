# SPDX-License-Identifier: Apache-2.0
"""The map of guest memory: nothing lies over anything else, and the documentation names all of it."""

from __future__ import annotations

import io
from itertools import combinations
from pathlib import Path

import pytest
from eif_images import image

from enclavekit.codec.bzimage import BzImage
from enclavekit.eif import read
from enclavekit.platform.guest_map import guest_map, joined
from enclavekit.platform.machine import GIB, MIB, BootProtocol

KERNEL = BzImage(
    setup_sects=4, version=0x20F, loadflags=1, code32_start=0x100000, initrd_addr_max=0x7FFFFFFF,
    kernel_alignment=2 * MIB, relocatable=True, xloadflags=3, cmdline_size=2047, payload_offset=0, payload_length=0,
    pref_address=16 * MIB, init_size=60 * MIB, banner="",
)  # fmt: skip
DOCUMENT = (Path(__file__).parents[3] / "docs/how-an-enclave-boots.md").read_text()


@pytest.mark.parametrize("memory", [256 * MIB, 5 * GIB])
@pytest.mark.parametrize("protocol", list(BootProtocol))
def test_nothing_lies_over_anything_else(protocol: BootProtocol, memory: int) -> None:
    found = guest_map(protocol, KERNEL, read(io.BytesIO(image())), memory)
    for one, other in combinations([one for one in found if one.name != "ramdisks"], 2):
        assert one.end <= other.start or other.end <= one.start, (one, other)
    by_name = {one.name: one for one in found}
    ramdisks, whole = by_name["ramdisks"], by_name["image"]
    assert whole.start <= ramdisks.start < ramdisks.end <= whole.end
    assert ramdisks.start % 4096 == 0
    assert ("more RAM" in by_name) == (memory > 3 * GIB)


def test_ramdisks_join_as_the_loader_joins_them() -> None:
    assert joined([(0x1000, 100), (0x1000 + 112, 50)]) == (0x1000, 162)
    assert joined([(0x1000, 100), (0x1000 + 200, 50)]) == (0x1000, 150)
    assert joined([(0x1010, 100), (0x1010 + 112, 50)]) == (0x1000, 150)


@pytest.mark.parametrize("protocol", list(BootProtocol))
def test_the_documentation_names_all_of_it(protocol: BootProtocol) -> None:
    names = {one.name for one in guest_map(protocol, KERNEL, read(io.BytesIO(image())), 256 * MIB)}
    assert [name for name in names if name not in DOCUMENT.replace("\n", " ")] == []
    assert f"| `{protocol}` |" in DOCUMENT
