# SPDX-License-Identifier: Apache-2.0
"""An image that never was a file: its parts, assembled in the memory of a machine, boot and run."""

from __future__ import annotations

from pathlib import Path

from conftest import Enclave

from enclavekit import eif
from enclavekit.enclave.supervisor import Streams, Supervisor
from enclavekit.environment import data_directory
from enclavekit.hypervisor.accel import Accel
from enclavekit.hypervisor.contract import LaunchSpec, Mode
from enclavekit.hypervisor.launch import launch
from enclavekit.hypervisor.parts import Parts
from enclavekit.hypervisor.qemu import QemuCarrier
from enclavekit.image.kernel import image_discovery
from enclavekit.runtime import find_qemu


def test_kernel_command_line_and_ramdisks_boot(enclave: Enclave, rootfs: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.eif"
    built = enclave("build", f"dir:{rootfs}", "--logs", "-o", path, "--", "sh", "-c", "echo assembled; exit 7")
    assert built.returncode == 0, built.stderr
    qemu = find_qemu(data_directory() / "runtime")
    carrier = QemuCarrier(qemu.command, qemu.environment, qemu.version, Accel.TCG)
    with path.open("rb") as file:
        image = eif.read(file)
        spec = LaunchSpec("00000000", 256 << 20, 1, 0, image_discovery(file, image), tmp_path)
        said = bytearray()
        started = launch(carrier.create, spec, Parts.of_image(file, image, "a.eif"), mode=Mode.DEBUG)
        try:
            outcome = Supervisor(started, Streams(output=said.extend)).wait()
        finally:
            started.close()
    assert (outcome.exit_code, bytes(said)) == (7, b"assembled\n")
