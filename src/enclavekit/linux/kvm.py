# SPDX-License-Identifier: Apache-2.0
"""/dev/kvm: a tiny guest that measures how fast KVM really runs.

Source: linux: include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h. A /dev/kvm may be there that emulates every
instruction (nested page-table virtualization): it runs small guests and no Linux, so its presence says nothing.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import mmap
import os
import time
from contextlib import ExitStack
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from pathlib import Path

IOC_WRITE, IOC_READ = 1, 2
KVMIO = 0xAE
KVM_API_VERSION = 12
KVM_EXIT_HLT = 5


def _ioc(direction: int, number: int, size: int = 0) -> int:
    """An ioctl's number (linux: include/uapi/asm-generic/ioctl.h)."""
    return direction << 30 | size << 16 | KVMIO << 8 | number


class kvm_userspace_memory_region(ctypes.Structure):  # noqa: N801 - the kernel's name
    """A slot of guest memory."""

    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    )


class kvm_segment(ctypes.Structure):  # noqa: N801
    """A segment register with its hidden part."""

    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    )


class kvm_sregs(ctypes.Structure):  # noqa: N801
    """System registers; only cs is touched here."""

    _fields_ = (("cs", kvm_segment), ("rest", c_uint8 * 288))


class kvm_regs(ctypes.Structure):  # noqa: N801
    """General registers, rip and rflags."""

    _fields_ = (("general", c_uint64 * 16), ("rip", c_uint64), ("rflags", c_uint64))


class kvm_run(ctypes.Structure):  # noqa: N801
    """The head of a vCPU's shared page."""

    _fields_ = (
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
    )


KVM_GET_API_VERSION = _ioc(0, 0x00)
KVM_CREATE_VM = _ioc(0, 0x01)
KVM_GET_VCPU_MMAP_SIZE = _ioc(0, 0x04)
KVM_CREATE_VCPU = _ioc(0, 0x41)
KVM_SET_USER_MEMORY_REGION = _ioc(IOC_WRITE, 0x46, ctypes.sizeof(kvm_userspace_memory_region))
KVM_RUN = _ioc(0, 0x80)
KVM_SET_REGS = _ioc(IOC_WRITE, 0x82, ctypes.sizeof(kvm_regs))
KVM_GET_SREGS = _ioc(IOC_READ, 0x83, ctypes.sizeof(kvm_sregs))
KVM_SET_SREGS = _ioc(IOC_WRITE, 0x84, ctypes.sizeof(kvm_sregs))

LOOP_ADDRESS = 0x1000
LOOP_ITERATIONS = 20_000
# mov cx, iterations; 1: dec cx; jnz 1b; hlt
LOOP = b"\xb9" + LOOP_ITERATIONS.to_bytes(2, "little") + b"\x49\x75\xfd\xf4"
LOOP_INSTRUCTIONS = 2 * LOOP_ITERATIONS
TRIES, PATIENCE_S = 5, 0.03


def measure_speed(device: Path = Path("/dev/kvm")) -> float:
    """Instructions a second of a small loop in real mode: some 1e9 with hardware, 2e6 where KVM emulates.

    Raises ``OSError`` where KVM is absent, closed to this user, or cannot run even this.
    """
    with ExitStack() as cleanup:

        def owned(fd: int) -> int:
            cleanup.callback(os.close, fd)
            return fd

        system = owned(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        if fcntl.ioctl(system, KVM_GET_API_VERSION) != KVM_API_VERSION:
            raise OSError(f"{device} does not speak KVM's API version {KVM_API_VERSION}")
        machine = owned(fcntl.ioctl(system, KVM_CREATE_VM, 0))
        memory = cleanup.enter_context(mmap.mmap(-1, 0x10000))
        memory[LOOP_ADDRESS : LOOP_ADDRESS + len(LOOP)] = LOOP
        anchor = ctypes.c_char.from_buffer(memory)
        region = kvm_userspace_memory_region(0, 0, 0, len(memory), ctypes.addressof(anchor))
        del anchor
        fcntl.ioctl(machine, KVM_SET_USER_MEMORY_REGION, region)
        vcpu = owned(fcntl.ioctl(machine, KVM_CREATE_VCPU, 0))
        shared = cleanup.enter_context(mmap.mmap(vcpu, fcntl.ioctl(system, KVM_GET_VCPU_MMAP_SIZE)))

        system_registers = kvm_sregs()
        fcntl.ioctl(vcpu, KVM_GET_SREGS, system_registers)
        system_registers.cs.base, system_registers.cs.selector = 0, 0
        fcntl.ioctl(vcpu, KVM_SET_SREGS, system_registers)
        # The best of a few: one preemption on a busy machine must not look like emulation.
        best_s, end = math.inf, time.perf_counter() + PATIENCE_S
        for _ in range(TRIES):
            fcntl.ioctl(vcpu, KVM_SET_REGS, kvm_regs(rip=LOOP_ADDRESS, rflags=2))
            start = time.perf_counter()
            fcntl.ioctl(vcpu, KVM_RUN, 0)
            best_s = min(best_s, time.perf_counter() - start)
            reason = kvm_run.from_buffer_copy(shared).exit_reason
            if reason != KVM_EXIT_HLT:
                raise OSError(f"{device}: the probe's guest left with exit reason {reason}, not {KVM_EXIT_HLT}")
            if time.perf_counter() > end:
                break
        return LOOP_INSTRUCTIONS / best_s
