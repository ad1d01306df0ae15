# SPDX-License-Identifier: Apache-2.0
"""The choice between KVM and TCG, by measured speed."""

from __future__ import annotations

import pytest

from enclavekit.errors import MissingError
from enclavekit.hypervisor.accel import Accel, choose


def absent() -> float:
    raise FileNotFoundError(2, "No such file or directory")


def test_hardware_speed_is_used() -> None:
    choice = choose(probe=lambda: 1.2e9)
    assert (choice.accel, choice.reason) == (Accel.KVM, "/dev/kvm runs 1200 million instructions a second")


def test_a_kvm_that_emulates_is_not() -> None:
    choice = choose(probe=lambda: 2.1e6)
    assert choice.accel is Accel.TCG
    assert choice.reason == "/dev/kvm runs 2 million instructions a second: emulated, not used"


def test_no_kvm_is_tcg_and_says_why() -> None:
    choice = choose(probe=absent)
    assert (choice.accel, choice.reason) == (Accel.TCG, "/dev/kvm: no such file or directory")


def test_what_is_asked_for_is_taken() -> None:
    assert choose(Accel.TCG, probe=lambda: 1e9).accel is Accel.TCG
    assert choose(Accel.KVM, probe=lambda: 2e6).accel is Accel.KVM


def test_asking_for_a_kvm_that_is_not_there() -> None:
    with pytest.raises(MissingError) as caught:
        choose(Accel.KVM, probe=absent)
    assert str(caught.value) == "KVM cannot be used: /dev/kvm: no such file or directory"
    assert caught.value.hint == "leave --accel out: TCG is used then"


def test_an_emulated_guest_is_told_that_string_instructions_are_slow() -> None:
    assert Accel.KVM.cpu_model == "host"
    assert set(Accel.TCG.cpu_model.split(",")) >= {"erms=off", "fsrm=off"}
