# SPDX-License-Identifier: Apache-2.0
"""The contract over carrier ``simulated``, and over ``nitro`` with its ioctls answered by the simulator."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from carrier_contract import CarrierContract, Subject

from enclavekit.eif import BytesContent, Discovery
from enclavekit.hypervisor.contract import LaunchSpec
from enclavekit.hypervisor.nitro import HugePages, NitroCarrier
from enclavekit.hypervisor.nitro_memory import PageChoice
from enclavekit.hypervisor.parts import Parts
from enclavekit.testing.nitro_device import SimulatedDevice
from enclavekit.testing.nitro_driver import SimulatedDriver
from enclavekit.testing.simulated import SimulatedCarrier, UnixVsock, map_aligned

MIB = 1 << 20
PARTS = Parts(BytesContent(b"K" * 700), b"console=ttyS0", [BytesContent(b"1" * 99), BytesContent(b"2" * 50)])


def spec(directory: Path) -> LaunchSpec:
    return LaunchSpec("00000001", 64 * MIB, 2, PARTS.size, Discovery.CMDLINE, directory)


def image() -> io.BytesIO:
    made = io.BytesIO()
    PARTS.write(made)
    return made


class TestSimulated(CarrierContract):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Iterator[Subject]:
        carrier = SimulatedCarrier(tmp_path)

        def end() -> None:
            carrier.driver.slots[-1].end()

        yield Subject(carrier, spec(tmp_path), image(), PARTS, carrier.vsock.beat, end)
        carrier.close()


class TestNitro(CarrierContract):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Iterator[Subject]:
        """Memory as nitro-cli takes it: some larger pages, then smaller ones."""
        driver = SimulatedDriver()
        device, vsock = SimulatedDevice(driver), UnixVsock(tmp_path)
        pages = HugePages(lambda: [32 * MIB, 2 * MIB], map_aligned, PageChoice.NITRO_CLI)
        carrier = NitroCarrier(device, pages, vsock, tmp_path / "lock")

        def end() -> None:
            driver.slots[-1].end()

        yield Subject(carrier, spec(tmp_path), image(), PARTS, vsock.beat, end)
        device.close()
