# SPDX-License-Identifier: Apache-2.0
"""Which carrier an enclave gets: the one asked for, or the best that this machine has.

``MAKERS`` is the table of them: each makes its carrier ready, or raises MissingError that says what the machine lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from pathlib import Path

from enclavekit.errors import MissingError
from enclavekit.hypervisor.accel import Accel, Choice, choose
from enclavekit.hypervisor.contract import Carrier
from enclavekit.hypervisor.kvm import KvmCarrier
from enclavekit.hypervisor.nitro import NitroCarrier
from enclavekit.hypervisor.qemu import QemuCarrier
from enclavekit.linux.nitro_enclaves import KernelDevice
from enclavekit.runtime import find_qemu


class CarrierName(StrEnum):
    """As ``--carrier`` has them, the best first."""

    NITRO = "nitro"
    KVM = "kvm"
    QEMU = "qemu"


@dataclass(frozen=True, slots=True)
class CarrierOptions:
    """What the caller says, or its environment, of how carriers are made.

    ``qemu`` is a QEMU instead of the runtime's, whose directory is ``runtime_root``; ``search_path`` is a PATH, and
    ``environment`` what programs get; ``accel`` None is for the best. ``cgroup``: it is to run in a control group.
    """

    runtime_root: Path
    search_path: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    qemu: str | None = None
    accel: Accel | None = None
    cgroup: bool = False
    nitro_device: Path = Path("/dev/nitro_enclaves")
    choose_accel: Callable[[Accel | None], Choice] = choose


@dataclass(frozen=True, slots=True)
class Selected:
    """A carrier that is ready, and in words what it is and why."""

    name: CarrierName
    carrier: Carrier
    reason: str
    accel: Accel | None = None
    lacks: str | None = None
    """What enclaves on it have to do without, in a sentence."""


def select_carrier(wanted: CarrierName | None, options: CarrierOptions) -> Selected:
    """Make ``wanted`` ready, or the first that can work here. Errors: MissingError.

    Where none can, the error is QEMU's: every machine could have it. ``qemu`` and ``accel`` are words for QEMU: with
    one of them the choice does not fall on ``kvm``, unless that is wanted, where KVM as ``accel`` overrules the probe.
    """
    if wanted is not None:
        if wanted not in MAKERS:
            raise MissingError(
                f"carrier {wanted}: this version does not have it", hint=f"--carrier {' or '.join(MAKERS)}"
            )
        return MAKERS[wanted](options)
    options = replace(options, choose_accel=cache(options.choose_accel))  # several ask, and the probe takes its time
    failures: dict[CarrierName, MissingError] = {}
    for name, make in MAKERS.items():
        if name is CarrierName.KVM and (options.qemu is not None or options.accel is not None or options.cgroup):
            continue
        try:
            return make(options)
        except MissingError as error:
            failures[name] = error
    raise failures[CarrierName.QEMU]


def _qemu(options: CarrierOptions) -> Selected:
    found = find_qemu(options.runtime_root, options.qemu, options.search_path)
    chosen = options.choose_accel(options.accel)
    carrier = QemuCarrier(found.command, {**options.environment, **found.environment}, found.version, chosen.accel)
    version = ".".join(map(str, found.version))
    lacks = None if carrier.has_nsm else f"no attestation: QEMU {version} has no NSM device, which came with 10.2"
    reason = f"QEMU {version} with {chosen.accel}: {chosen.reason}"
    return Selected(CarrierName.QEMU, carrier, reason, chosen.accel, lacks)


def _nitro(options: CarrierOptions) -> Selected:
    if not options.nitro_device.exists():
        raise MissingError(
            f"carrier nitro: there is no {options.nitro_device}",
            hint="an EC2 instance launched with enclave support has it, once its module nitro_enclaves is loaded",
        )
    carrier = NitroCarrier(device=KernelDevice(options.nitro_device))
    return Selected(CarrierName.NITRO, carrier, f"the driver behind {options.nitro_device}")


def _kvm(options: CarrierOptions) -> Selected:
    """Where the probe shows hardware speed, or KVM is insisted on."""
    if options.accel is Accel.TCG:
        raise MissingError("carrier kvm: runs no guest by TCG", hint="--carrier qemu does")
    chosen = options.choose_accel(options.accel)
    if chosen.accel is not Accel.KVM:
        raise MissingError(
            f"carrier kvm: {chosen.reason}", hint="leave --carrier out, or add --accel kvm to use it all the same"
        )
    return Selected(CarrierName.KVM, KvmCarrier(), f"KVM: {chosen.reason}", Accel.KVM)


MAKERS: Mapping[CarrierName, Callable[[CarrierOptions], Selected]] = {
    CarrierName.NITRO: _nitro,
    CarrierName.KVM: _kvm,
    CarrierName.QEMU: _qemu,
}
