# SPDX-License-Identifier: Apache-2.0
"""KVM's structures and ioctl numbers as computed, against the kernel's; the probe where there is a /dev/kvm."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from enclavekit.linux import kvm
from enclavekit.linux import kvm_abi as abi


def test_ioctl_numbers() -> None:
    assert (abi.KVM_GET_API_VERSION, abi.KVM_CREATE_VM, abi.KVM_RUN) == (0xAE00, 0xAE01, 0xAE80)
    assert abi.KVM_SET_USER_MEMORY_REGION == 0x4020AE46
    assert (abi.KVM_SET_REGS, abi.KVM_GET_SREGS, abi.KVM_SET_SREGS) == (0x4090AE82, 0x8138AE83, 0x4138AE84)


def test_structure_sizes() -> None:
    sizes = [ctypes.sizeof(kind) for kind in (abi.kvm_userspace_memory_region, abi.kvm_regs, abi.kvm_sregs)]
    assert sizes == [32, 144, 312]
    assert abi.kvm_run.exit_reason.offset == 8


def test_no_kvm_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        kvm.measure_speed(tmp_path / "kvm")
    (tmp_path / "kvm").write_text("")
    with pytest.raises(OSError, match="Inappropriate ioctl"):
        kvm.measure_speed(tmp_path / "kvm")


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm for this user")
def test_the_probe_runs_its_guest() -> None:
    assert kvm.measure_speed() > 1e5
