# SPDX-License-Identifier: Apache-2.0
"""Where a kernel boots, and the reasons why not elsewhere."""

from __future__ import annotations

import pytest

from enclavekit.eif import Arch
from enclavekit.errors import FormatError
from enclavekit.image.kernel_carriers import Carrier, Verdict, verdicts
from enclavekit.image.kernel_features import Answer, Feature, KernelFeatures, LearnedFrom

OURS = frozenset(Feature) - {Feature.ACPI, Feature.MODULES}
DEBIAN = frozenset({Feature.INITRAMFS, Feature.ACPI, Feature.MODULES})
MODULES = {"virtio_mmio", "vmw_vsock_virtio_transport", "nsm"}


def of(found: frozenset[Feature]) -> KernelFeatures:
    return KernelFeatures(LearnedFrom.CONFIGURATION, "6.12.1", {}, found)


def boots(found: list[Verdict]) -> dict[str, str]:
    return {verdict.carrier.value: verdict.boots.value for verdict in found}


def test_ours_boots_everywhere() -> None:
    assert verdicts(of(OURS), Arch.X86_64) == [Verdict(carrier, Answer.YES) for carrier in Carrier]


def test_debians_boots_locally_with_its_modules() -> None:
    found = verdicts(of(DEBIAN), Arch.X86_64, MODULES)
    assert boots(found) == {"qemu": "yes", "kvm": "yes", "nitro": "no"}
    assert found[-1].reasons == ("no virtio-mmio devices from the command line", "no MP table")


def test_without_its_modules_it_boots_nowhere() -> None:
    found = verdicts(of(DEBIAN), Arch.X86_64)
    assert boots(found) == {"qemu": "no", "kvm": "no", "nitro": "no"}
    assert found[0].reasons == ("no virtio-mmio driver", "no virtio vsock driver")


@pytest.mark.parametrize("feature", [Feature.INITRAMFS, Feature.VIRTIO_MMIO, Feature.VSOCK])
def test_what_every_carrier_asks_for(feature: Feature) -> None:
    assert set(boots(verdicts(of(OURS - {feature}), Arch.X86_64)).values()) == {"no"}


def test_a_kernel_that_finds_no_device_locally() -> None:
    found = verdicts(of(OURS - {Feature.CMDLINE_DEVICES}), Arch.X86_64)
    assert found[0].reasons == ("finds devices neither by the command line nor by ACPI",)


def test_aarch64_boots_on_ec2_only() -> None:
    found = verdicts(of(OURS - {Feature.CMDLINE_DEVICES, Feature.MP_TABLE}), Arch.AARCH64)
    assert boots(found) == {"qemu": "no", "kvm": "no", "nitro": "yes"}


def test_of_a_kernel_that_cannot_be_read_nothing_is_known() -> None:
    found = verdicts(KernelFeatures(trouble=FormatError("kernel: no Linux")), Arch.X86_64)
    assert found == [Verdict(carrier, Answer.UNKNOWN, ("kernel: no Linux",)) for carrier in Carrier]
