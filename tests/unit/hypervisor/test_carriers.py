# SPDX-License-Identifier: Apache-2.0
"""Which carrier an enclave gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from enclavekit.eif import Discovery
from enclavekit.errors import LaunchError, MissingError, NoQemuError
from enclavekit.hypervisor import carriers
from enclavekit.hypervisor.accel import Accel, Choice
from enclavekit.hypervisor.carriers import CarrierName, CarrierOptions, Selected, select_carrier
from enclavekit.hypervisor.contract import Enclave, LaunchSpec
from enclavekit.hypervisor.kvm import KvmCarrier
from enclavekit.hypervisor.qemu import QemuCarrier


class Other:
    def create(self, spec: LaunchSpec) -> Enclave:
        raise NotImplementedError


def options(tmp_path: Path, *, qemu: bool) -> CarrierOptions:
    program = tmp_path / "qemu-system-x86_64"
    if qemu:
        program.write_text("#!/bin/sh\necho QEMU emulator version 11.1.0\n")
        program.chmod(0o755)
    return CarrierOptions(
        runtime_root=tmp_path,
        search_path=str(tmp_path),
        environment={"LANG": "C"},
        choose_accel=lambda wanted: Choice(wanted or Accel.KVM, "fast"),
    )


def have(monkeypatch: pytest.MonkeyPatch, **found: bool) -> None:
    """Make carriers by these names; those that are False lack something."""

    def maker(name: CarrierName, *, there: bool) -> Callable[[CarrierOptions], Selected]:
        def make(options: CarrierOptions) -> Selected:
            del options
            if not there:
                raise MissingError(f"{name}: not here")
            return Selected(name, Other(), "here")

        return make

    makers = {CarrierName(name): maker(CarrierName(name), there=there) for name, there in found.items()}
    monkeypatch.setattr(carriers, "MAKERS", {**makers, CarrierName.QEMU: carriers.MAKERS[CarrierName.QEMU]})


def test_qemu_with_what_it_needs(tmp_path: Path) -> None:
    found = select_carrier(CarrierName.QEMU, options(tmp_path, qemu=True))
    assert (found.name, found.accel) == (CarrierName.QEMU, Accel.KVM)
    assert found.reason == "QEMU 11.1.0 with kvm: fast"
    assert isinstance(found.carrier, QemuCarrier)
    assert found.carrier.environment == {"LANG": "C"}


def test_the_first_that_can_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, nitro=True)
    assert select_carrier(None, options(tmp_path, qemu=True)).name is CarrierName.NITRO
    have(monkeypatch, nitro=False)
    assert select_carrier(None, options(tmp_path, qemu=True)).name is CarrierName.QEMU


def test_none_can_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, nitro=False)
    with pytest.raises(NoQemuError):
        select_carrier(None, options(tmp_path, qemu=False))
    with pytest.raises(MissingError, match="nitro: not here"):
        select_carrier(CarrierName.NITRO, options(tmp_path, qemu=True))


def with_kvm(tmp_path: Path, found: Choice, **more: object) -> CarrierOptions:
    return replace(options(tmp_path, qemu=True), choose_accel=lambda wanted: found, **more)  # type: ignore[arg-type]


FAST = Choice(Accel.KVM, "/dev/kvm runs 400 million instructions a second")
SLOW = Choice(Accel.TCG, "/dev/kvm runs 2 million instructions a second: emulated, not used")


def test_kvm_is_chosen_where_it_is_fast(tmp_path: Path) -> None:
    selected = select_carrier(None, with_kvm(tmp_path, FAST))
    assert (selected.name, selected.accel) == (CarrierName.KVM, Accel.KVM)
    assert selected.reason == "KVM: /dev/kvm runs 400 million instructions a second"
    assert isinstance(selected.carrier, KvmCarrier)
    assert select_carrier(None, with_kvm(tmp_path, SLOW)).name is CarrierName.QEMU


def test_words_for_qemu_choose_qemu(tmp_path: Path) -> None:
    assert select_carrier(None, with_kvm(tmp_path, FAST, accel=Accel.KVM)).name is CarrierName.QEMU
    named = str(tmp_path / "qemu-system-x86_64")
    assert select_carrier(None, with_kvm(tmp_path, FAST, qemu=named)).name is CarrierName.QEMU
    assert select_carrier(CarrierName.KVM, with_kvm(tmp_path, FAST, qemu=named)).name is CarrierName.KVM


def test_control_groups_are_for_processes_of_their_own(tmp_path: Path) -> None:
    assert select_carrier(None, with_kvm(tmp_path, FAST, cgroup=True)).name is CarrierName.QEMU
    spec = LaunchSpec("00000000", 1 << 20, 1, 0, Discovery.CMDLINE, tmp_path, cgroup=tmp_path)
    with pytest.raises(LaunchError) as caught:
        KvmCarrier().create(spec)
    assert caught.value.message == (
        "control group: carrier kvm runs an enclave in threads of its process, which cannot have one"
    )
    assert caught.value.hint == "--carrier qemu"


def test_kvm_that_is_slow_is_refused_unless_insisted_on(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        select_carrier(CarrierName.KVM, with_kvm(tmp_path, SLOW))
    assert caught.value.message == ("carrier kvm: /dev/kvm runs 2 million instructions a second: emulated, not used")
    assert caught.value.hint == "leave --carrier out, or add --accel kvm to use it all the same"
    insisted = with_kvm(tmp_path, Choice(Accel.KVM, "/dev/kvm runs 2 million instructions a second"), accel=Accel.KVM)
    assert select_carrier(CarrierName.KVM, insisted).name is CarrierName.KVM
    with pytest.raises(MissingError, match="runs no guest by TCG"):
        select_carrier(CarrierName.KVM, with_kvm(tmp_path, SLOW, accel=Accel.TCG))
