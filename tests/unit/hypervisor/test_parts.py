# SPDX-License-Identifier: Apache-2.0
"""Parts assembled in enclave memory: the same image as a file of them, wherever the regions' borders lie."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit import eif
from enclavekit.eif import Arch, BytesContent, Discovery, SectionType
from enclavekit.errors import EifError, LaunchError
from enclavekit.hypervisor.contract import Enclave, LaunchSpec, MemoryRegion, Mode
from enclavekit.hypervisor.launch import launch
from enclavekit.hypervisor.parts import Parts, RegionWriter, assemble

PARTS = Parts(BytesContent(b"K" * 700), b"console=ttyS0", [BytesContent(b"1" * 99), BytesContent(b"2" * 50)])


def regions_of(memory: bytearray, sizes: Sequence[int]) -> list[MemoryRegion]:
    regions, at = [], 0
    for size in sizes:
        regions.append(MemoryRegion(at, memoryview(memory)[at : at + size]))
        at += size
    return regions


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30), st.integers(0, 600))
def test_the_image_lies_whole_across_any_regions(sizes: list[int], offset: int) -> None:
    file = io.BytesIO()
    PARTS.write(file)
    memory = bytearray(sum(sizes))
    regions = regions_of(memory, sizes)
    if offset + PARTS.size > len(memory):
        with pytest.raises(LaunchError) as caught:
            assemble(PARTS, regions, offset)
        assert str(caught.value) == f"memory: need {offset + PARTS.size} bytes for the image, have {len(memory)}"
    else:
        assemble(PARTS, regions, offset)
        assert memory[offset : offset + PARTS.size] == file.getvalue()
        assert not any(memory[:offset])
        assert not any(memory[offset + PARTS.size :])


def test_headers_and_checksum_are_those_of_an_eif(tmp_path: Path) -> None:
    memory = bytearray(PARTS.size)
    written = assemble(PARTS, regions_of(memory, [len(memory)]), 0)
    path = tmp_path / "image.eif"
    path.write_bytes(memory)
    with path.open("rb") as file:
        image = eif.read(file)
        assert image.header.crc == written.crc == zlib.crc32(memory[548:], zlib.crc32(memory[:544]))
        assert [section.type for section in image.sections] == [
            SectionType.KERNEL,
            SectionType.CMDLINE,
            SectionType.METADATA,
            SectionType.RAMDISK,
            SectionType.RAMDISK,
        ]
        assert image.ramdisks[0].offset % 4096 == 0, "Linux warns of a ramdisk that does not begin on a page"
        assert eif.measure(file, image, name="image").measurements == written.measurements
        again = Parts.of_image(file, image, "image.eif")
        copy = io.BytesIO()
        assert again.write(copy).measurements == written.measurements
    assert copy.getvalue() == memory


def test_the_flow_takes_parts_and_knows_their_size() -> None:
    memory = bytearray(8192)
    specs: list[LaunchSpec] = []

    class Memory:
        def allocate(self, size: int) -> list[MemoryRegion]:
            return regions_of(memory, [1000, size - 1000])

        def image_load_offset(self, kind: object) -> int:
            return 64

        def set_user_memory_region(self, region: MemoryRegion) -> None: ...

        def add_vcpu(self, cpu: int | None = None) -> int:
            return cpu or 1

        def start(self, *, mode: Mode, cid: int | None = None) -> int:
            return cid or 16

        def close(self) -> None: ...

    def create(spec: LaunchSpec) -> Enclave:
        specs.append(spec)
        return cast(Enclave, Memory())

    spec = LaunchSpec("00000000", len(memory), 1, 0, Discovery.ACPI, Path("/nowhere"))
    launch(create, spec, PARTS, mode=Mode.DEBUG)
    assert specs[0].image_size == PARTS.size
    assert memory[64:68] == b".eif"


def test_an_image_for_another_machine_says_so() -> None:
    parts = Parts(BytesContent(b"K"), b"c", [BytesContent(b"1")], arch=Arch.AARCH64)
    memory = bytearray(parts.size)
    assemble(parts, regions_of(memory, [len(memory)]), 0)
    assert eif.inspect(io.BytesIO(memory)).arch is Arch.AARCH64


def test_parts_that_make_no_image() -> None:
    memory = bytearray(8192)
    with pytest.raises(EifError) as caught:
        assemble(Parts(BytesContent(b"K"), b"c", []), regions_of(memory, [8192]), 0)
    assert str(caught.value) == "EIF sections: 0 of type ramdisk, expected at least 1"


def test_nothing_is_written_past_the_end() -> None:
    writer = RegionWriter(regions_of(bytearray(10), [4, 6]), 2)
    with pytest.raises(ValueError, match=r"^1 bytes past the end of enclave memory$"):
        writer.write(b"123456789")
