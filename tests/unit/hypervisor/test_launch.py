# SPDX-License-Identifier: Apache-2.0
"""The basic flow over a carrier that is only memory: order of steps, image across regions, checksum."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.eif import Discovery
from enclavekit.errors import CarrierError, EifError, LaunchError
from enclavekit.hypervisor.contract import Enclave, ImageKind, LaunchSpec, MemoryRegion, Mode
from enclavekit.hypervisor.launch import launch, write_image


def image(size: int = 2000) -> bytes:
    """Not an EIF, but a CRC at its place."""
    data = bytearray(b".eif" + bytes(range(256)) * 20)[:size]
    data[544:548] = zlib.crc32(data[548:], zlib.crc32(data[:544])).to_bytes(4, "big")
    return bytes(data)


class FakeEnclave:
    """Remembers what was done to it."""

    def __init__(self, sizes: Sequence[int], offset: int) -> None:
        self.steps: list[str] = []
        self.memory = bytearray(sum(sizes))
        self.sizes, self.offset = sizes, offset
        self.fail_at_start = False

    def allocate(self, size: int) -> list[MemoryRegion]:
        self.steps.append(f"allocate {size}")
        regions, at = [], 0
        for part in self.sizes:
            regions.append(MemoryRegion(at, memoryview(self.memory)[at : at + part]))
            at += part
        return regions

    def image_load_offset(self, kind: ImageKind) -> int:
        self.steps.append(f"offset {kind.name}")
        return self.offset

    def set_user_memory_region(self, region: MemoryRegion) -> None:
        self.steps.append(f"region {region.offset}+{region.size}")

    def add_vcpu(self, cpu: int | None = None) -> int:
        self.steps.append("vcpu")
        return cpu or 0

    def start(self, *, mode: Mode, cid: int | None = None) -> int:
        self.steps.append(f"start {mode.name} {cid}")
        if self.fail_at_start:
            raise CarrierError("no")
        return cid or 16

    def close(self) -> None:
        self.steps.append("close")


def spec(size: int, cpus: int = 2) -> LaunchSpec:
    return LaunchSpec("00000000", 4096, cpus, size, Discovery.ACPI, Path("/nowhere"))


def test_the_flow_in_its_order() -> None:
    enclave = FakeEnclave([1000, 3096], offset=100)
    data = image()
    made = launch(lambda _: cast(Enclave, enclave), spec(len(data)), io.BytesIO(data), mode=Mode.DEBUG, cid=17)
    assert made == cast(Enclave, enclave)
    assert enclave.steps == [
        "offset EIF",
        "allocate 4096",
        "region 0+1000",
        "region 1000+3096",
        "vcpu",
        "vcpu",
        "start DEBUG 17",
    ]
    assert enclave.memory[100:2100] == data


def test_a_failed_start_leaves_nothing() -> None:
    enclave = FakeEnclave([4096], offset=0)
    enclave.fail_at_start = True
    data = image()
    with pytest.raises(CarrierError):
        launch(lambda _: cast(Enclave, enclave), spec(len(data)), io.BytesIO(data), mode=Mode.PRODUCTION)
    assert enclave.steps[-1] == "close"


@given(st.lists(st.integers(1, 900), min_size=3, max_size=12), st.integers(0, 500), st.integers(548, 1500))
def test_the_image_lies_whole_across_any_regions(sizes: list[int], offset: int, size: int) -> None:
    data = image(size)
    enclave = FakeEnclave(sizes, offset)
    regions = enclave.allocate(0)
    if offset + size > sum(sizes):
        with pytest.raises(LaunchError, match="memory: need"):
            write_image(io.BytesIO(data), size, regions, offset)
    else:
        write_image(io.BytesIO(data), size, regions, offset)
        assert enclave.memory[offset : offset + size] == data


def test_a_wrong_checksum_is_not_booted() -> None:
    data = bytearray(image())
    data[1000] ^= 1
    with pytest.raises(EifError, match=r"^image checksum: got 0x[0-9a-f]{8} in the header, expected 0x[0-9a-f]{8}$"):
        write_image(io.BytesIO(data), len(data), FakeEnclave([4096], 0).allocate(0), 0)


def test_a_file_that_shrank_is_not_booted() -> None:
    with pytest.raises(EifError) as caught:
        write_image(io.BytesIO(image()[:1000]), 2000, FakeEnclave([4096], 0).allocate(0), 0)
    assert str(caught.value) == "image ends at offset 0x3e8, expected 2000 bytes"
