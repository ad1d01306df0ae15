# SPDX-License-Identifier: Apache-2.0
"""Where a kernel can boot, and why not elsewhere: what each carrier's machine asks of it.

Every carrier gives virtio-mmio devices and vsock. On EC2 (``nitro``) they are told of on the command line, CPUs and
interrupts in an MP table, and in no other way; ``qemu`` and ``kvm`` have ACPI too, for kernels that want it.
Source: Firecracker docs/design.md, linux drivers/virtio/virtio_mmio.c, arch/x86/kernel/mpparse.c.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from enclavekit.eif import Arch
from enclavekit.image.kernel_features import Answer, Feature, KernelFeatures


class Carrier(StrEnum):
    """What an enclave can be carried by."""

    QEMU = "qemu"
    KVM = "kvm"
    NITRO = "nitro"


ALL = (
    (Feature.INITRAMFS, None, "no ramdisks"),
    (Feature.VIRTIO_MMIO, "virtio_mmio", "no virtio-mmio driver"),
    (Feature.VSOCK, "vmw_vsock_virtio_transport", "no virtio vsock driver"),
)
"""What each asks for: a feature, the module that may bring it, and what to say where both are lacking."""

ON_EC2 = (
    (Feature.CMDLINE_DEVICES, "no virtio-mmio devices from the command line"),
    (Feature.MP_TABLE, "no MP table"),
)
NOT_LOCALLY = "carriers on this machine run x86_64"
NO_DISCOVERY = "finds devices neither by the command line nor by ACPI"


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one carrier; without ``reasons`` against it, ``boots`` is YES, or UNKNOWN for a kernel that cannot be read."""

    carrier: Carrier
    boots: Answer
    reasons: tuple[str, ...] = ()


def verdicts(features: KernelFeatures, arch: Arch, modules: Collection[str] = ()) -> list[Verdict]:
    """One for each carrier; ``modules`` are the names of those that init can load."""
    if features.trouble is not None:
        return [Verdict(carrier, Answer.UNKNOWN, (features.trouble.message,)) for carrier in Carrier]
    found = []
    for carrier in Carrier:
        reasons = [
            words for feature, module, words in ALL if features.has(feature) is Answer.NO and module not in modules
        ]
        reasons += _against(carrier, features, arch)
        found.append(Verdict(carrier, Answer.NO if reasons else Answer.YES, tuple(reasons)))
    return found


def ec2_reasons(features: KernelFeatures) -> list[str]:
    """Why an x86_64 kernel finds nothing on EC2; empty when it does, or when nothing is known."""
    return [words for feature, words in ON_EC2 if features.has(feature) is Answer.NO]


def _against(carrier: Carrier, features: KernelFeatures, arch: Arch) -> list[str]:
    if carrier is Carrier.NITRO:
        return ec2_reasons(features) if arch is Arch.X86_64 else []
    if arch is not Arch.X86_64:
        return [NOT_LOCALLY]
    by_command_line = features.has(Feature.CMDLINE_DEVICES) is Answer.YES
    return [] if by_command_line or features.has(Feature.ACPI) is Answer.YES else [NO_DISCOVERY]
