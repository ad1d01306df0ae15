# SPDX-License-Identifier: Apache-2.0
"""``--platform nitro``: a local machine that tells a kernel of its devices as a real enclave does.

The command line has virtio-mmio devices, an MP table has CPUs and interrupts; there is no ACPI and no PCI, and a write
to the keyboard controller ends the machine. What differs from EC2: under QEMU the devices' registers lie elsewhere.
"""

from __future__ import annotations

from typing import BinaryIO

from enclavekit.eif import Discovery, FileContent, Image
from enclavekit.errors import LaunchError
from enclavekit.image.kernel_carriers import ec2_reasons
from enclavekit.image.kernel_features import kernel_features


def nitro_discovery(file: BinaryIO, image: Image) -> Discovery:
    """By the command line, whatever the image's metadata say. LaunchError for a kernel that would find nothing.

    A kernel that cannot be read gets its chance: then the heartbeat tells.
    """
    features = kernel_features(FileContent(file, image.kernel.offset, image.kernel.size, "kernel"))
    reasons = ec2_reasons(features)
    if reasons:
        name = f"kernel {features.release}" if features.release else "kernel"
        raise LaunchError(
            f"{name}: {' and '.join(reasons)}, going by its {features.learned_from.value}: on EC2, and with --platform "
            "nitro, it finds no device and gives no sign of life",
            hint="enclave kernel build makes one that boots here and there; then enclave build --kernel NAME",
        )
    return Discovery.CMDLINE
