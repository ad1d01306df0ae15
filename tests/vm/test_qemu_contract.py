# SPDX-License-Identifier: Apache-2.0
"""The contract of all carriers (tests/unit/hypervisor/carrier_contract.py) over ``qemu``, with real machines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from carrier_contract import CarrierContract, Subject
from conftest import Enclave

from enclavekit import eif
from enclavekit.environment import data_directory
from enclavekit.hypervisor.accel import Accel
from enclavekit.hypervisor.contract import LaunchSpec
from enclavekit.hypervisor.parts import Parts
from enclavekit.hypervisor.qemu import QemuCarrier
from enclavekit.image.kernel import image_discovery
from enclavekit.runtime import find_qemu

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def image(rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its application ends by itself, soon after its heartbeat."""
    directory = tmp_path_factory.mktemp("contract")
    built = Enclave(directory)("build", f"dir:{rootfs}", "-o", directory / "a.eif", "--", "sh", "-c", "sleep 1")
    assert built.returncode == 0, built.stderr
    return directory / "a.eif"


class TestQemu(CarrierContract):
    @pytest.fixture
    def subject(self, image: Path, tmp_path: Path) -> Iterator[Subject]:
        qemu = find_qemu(data_directory() / "runtime")
        carrier = QemuCarrier(qemu.command, qemu.environment, qemu.version, Accel.TCG)
        with image.open("rb") as file:
            found = eif.read(file)
            spec = LaunchSpec("00000001", 256 << 20, 1, found.size, image_discovery(file, found), tmp_path)
            parts = Parts.of_image(file, found, "a.eif")
            yield Subject(carrier, spec, file, parts, beat=lambda: None, end=lambda: None)
