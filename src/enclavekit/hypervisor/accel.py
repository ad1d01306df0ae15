# SPDX-License-Identifier: Apache-2.0
"""Which accelerator QEMU gets: KVM where it runs a guest at hardware speed, else TCG."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from enclavekit.errors import MissingError
from enclavekit.linux import kvm

HARDWARE_SPEED = 50e6
"""Instructions a second of the probe's loop: emulation reaches some 2e6, hardware more than 4e8."""


class Accel(StrEnum):
    """What runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"

    @property
    def cpu_model(self) -> str:
        """QEMU's -cpu. TCG runs string instructions byte by byte: a guest that is not told that they are fast (ERMS,
        FSRM) copies with wider ones, and its kernel's copies take a fifth of the time.
        """
        return "host" if self is Accel.KVM else "max,erms=off,fsrm=off"


@dataclass(frozen=True, slots=True)
class Choice:
    """The accelerator, and in words why."""

    accel: Accel
    reason: str


def choose(wanted: Accel | None = None, *, probe: Callable[[], float] = kvm.measure_speed) -> Choice:
    """Probe KVM with a tiny guest; ``wanted`` overrules, but KVM must at least be there."""
    if wanted is Accel.TCG:
        return Choice(Accel.TCG, "asked for")
    try:
        speed = probe()
    except OSError as error:
        reason = f"/dev/kvm: {(error.strerror or str(error)).lower()}"
        if wanted is Accel.KVM:
            raise MissingError(f"KVM cannot be used: {reason}", hint="leave --accel out: TCG is used then") from error
        return Choice(Accel.TCG, reason)
    measured = f"/dev/kvm runs {speed / 1e6:.0f} million instructions a second"
    if speed >= HARDWARE_SPEED or wanted is Accel.KVM:
        return Choice(Accel.KVM, measured)
    return Choice(Accel.TCG, f"{measured}: emulated, not used")
