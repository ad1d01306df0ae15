# SPDX-License-Identifier: Apache-2.0
"""KVM's structures and ioctl numbers, named as in the kernel; x86_64 only.

Source: linux: include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h, include/uapi/asm-generic/ioctl.h.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum

IOC_WRITE, IOC_READ = 1, 2
KVMIO = 0xAE
KVM_API_VERSION = 12


def _ioc(direction: int, number: int, size: int = 0) -> int:
    """An ioctl's number."""
    return direction << 30 | size << 16 | KVMIO << 8 | number


class kvm_userspace_memory_region(ctypes.Structure):  # noqa: N801 - the kernel's names, here and below
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


class kvm_dtable(ctypes.Structure):  # noqa: N801
    """GDTR or IDTR."""

    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class kvm_sregs(ctypes.Structure):  # noqa: N801
    """System registers."""

    _fields_ = (
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    )


GENERAL_REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{number}" for number in range(8, 16)))


class kvm_regs(ctypes.Structure):  # noqa: N801
    """General registers, rip and rflags."""

    _fields_ = tuple((name, c_uint64) for name in (*GENERAL_REGISTERS, "rip", "rflags"))


class kvm_lapic_state(ctypes.Structure):  # noqa: N801
    """The page of local APIC registers."""

    _fields_ = (("regs", c_uint8 * 1024),)


class kvm_pit_config(ctypes.Structure):  # noqa: N801
    """Of the timer chip."""

    _fields_ = (("flags", c_uint32), ("pad", c_uint32 * 15))


class kvm_irq_level(ctypes.Structure):  # noqa: N801
    """The level of an interrupt line."""

    _fields_ = (("irq", c_uint32), ("level", c_uint32))


class kvm_irqfd(ctypes.Structure):  # noqa: N801
    """An eventfd that pulses an interrupt line."""

    _fields_ = (
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    )


class kvm_ioeventfd(ctypes.Structure):  # noqa: N801
    """A write by the guest that signals an eventfd and does not leave the kernel."""

    _fields_ = (
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    )


class kvm_cpuid_entry2(ctypes.Structure):  # noqa: N801
    """What CPUID answers to one leaf."""

    _fields_ = (
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    )


MAX_CPUID_ENTRIES = 256


class kvm_cpuid2(ctypes.Structure):  # noqa: N801
    """``nent`` entries."""

    _fields_ = (("nent", c_uint32), ("padding", c_uint32), ("entries", kvm_cpuid_entry2 * MAX_CPUID_ENTRIES))


class kvm_msr_entry(ctypes.Structure):  # noqa: N801
    """A model-specific register."""

    _fields_ = (("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64))


class kvm_msrs(ctypes.Structure):  # noqa: N801
    """One of them at a time."""

    _fields_ = (("nmsrs", c_uint32), ("pad", c_uint32), ("entries", kvm_msr_entry * 1))


class kvm_signal_mask(ctypes.Structure):  # noqa: N801
    """Signals that are blocked while the guest runs; the kernel's set has 8 bytes."""

    _pack_ = 1
    _fields_ = (("len", c_uint32), ("sigset", c_uint64))


class kvm_exit_io(ctypes.Structure):  # noqa: N801
    """IN or OUT: ``count`` times ``size`` bytes at ``data_offset`` of the shared pages."""

    _fields_ = (
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    )


class kvm_exit_mmio(ctypes.Structure):  # noqa: N801
    """An access to memory that is not there."""

    _fields_ = (("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8))


class kvm_exit_fail_entry(ctypes.Structure):  # noqa: N801
    """The processor refused the guest's state."""

    _fields_ = (("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32))


class kvm_exit_internal(ctypes.Structure):  # noqa: N801
    """KVM could not go on; for a failed emulation data is: flags, then size and bytes of the instruction."""

    _fields_ = (("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16))


class kvm_exit_hypercall(ctypes.Structure):  # noqa: N801
    """A call of the guest's that KVM does not serve."""

    _fields_ = (("nr", c_uint64), ("args", c_uint64 * 6), ("ret", c_uint64), ("flags", c_uint64))


class kvm_exit_msr(ctypes.Structure):  # noqa: N801
    """RDMSR or WRMSR of a register that KVM does not know."""

    _fields_ = (
        ("error", c_uint8),
        ("pad", c_uint8 * 7),
        ("reason", c_uint32),
        ("index", c_uint32),
        ("data", c_uint64),
    )


class kvm_exit_union(ctypes.Union):  # noqa: N801
    """What else there is to an exit. ``words`` is for what has no name here."""

    _fields_ = (
        ("io", kvm_exit_io),
        ("mmio", kvm_exit_mmio),
        ("fail_entry", kvm_exit_fail_entry),
        ("internal", kvm_exit_internal),
        ("system_event", kvm_exit_internal),  # type, ndata, data: the same layout
        ("hypercall", kvm_exit_hypercall),
        ("msr", kvm_exit_msr),
        ("words", c_uint64 * 32),
    )


class kvm_run(ctypes.Structure):  # noqa: N801
    """The head of the pages that a vCPU shares with us."""

    _anonymous_ = ("exit",)
    _fields_ = (
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exit", kvm_exit_union),
    )


class ExitReason(IntEnum):
    """Why KVM_RUN came back (KVM_EXIT_*); those of other architectures are not here."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    HYPERV = 27
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    AP_RESET_HOLD = 32
    X86_BUS_LOCK = 33
    XEN = 34
    NOTIFY = 37
    MEMORY_FAULT = 39


KVM_EXIT_IO_OUT = 1
KVM_SYSTEM_EVENT_SHUTDOWN, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_CRASH = 1, 2, 3
KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERRORS = {
    KVM_INTERNAL_ERROR_EMULATION: "an instruction that KVM cannot emulate",
    2: "exceptions at once",
    3: "an exit while an event was delivered",
    4: "an exit for a reason that KVM does not know",
}

KVM_MEM_READONLY = 2
KVM_IOEVENTFD_FLAG_DATAMATCH, KVM_IOEVENTFD_FLAG_PIO, KVM_IOEVENTFD_FLAG_DEASSIGN = 1, 2, 4
KVM_IRQFD_FLAG_DEASSIGN = 1
KVM_PIT_SPEAKER_DUMMY = 1
KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1

KVM_CAP_IRQCHIP = 0
KVM_CAP_IRQFD = 32
KVM_CAP_PIT2 = 33
KVM_CAP_IOEVENTFD = 36
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_READONLY_MEM = 81
KVM_CAP_MAX_VCPUS = 66

KVM_GET_API_VERSION = _ioc(0, 0x00)
KVM_CREATE_VM = _ioc(0, 0x01)
KVM_CHECK_EXTENSION = _ioc(0, 0x03)
KVM_GET_VCPU_MMAP_SIZE = _ioc(0, 0x04)
KVM_GET_SUPPORTED_CPUID = _ioc(IOC_READ | IOC_WRITE, 0x05, 8)
KVM_CREATE_VCPU = _ioc(0, 0x41)
KVM_SET_USER_MEMORY_REGION = _ioc(IOC_WRITE, 0x46, ctypes.sizeof(kvm_userspace_memory_region))
KVM_SET_TSS_ADDR = _ioc(0, 0x47)
KVM_SET_IDENTITY_MAP_ADDR = _ioc(IOC_WRITE, 0x48, 8)
KVM_CREATE_IRQCHIP = _ioc(0, 0x60)
KVM_IRQ_LINE = _ioc(IOC_WRITE, 0x61, ctypes.sizeof(kvm_irq_level))
KVM_IRQFD = _ioc(IOC_WRITE, 0x76, ctypes.sizeof(kvm_irqfd))
KVM_CREATE_PIT2 = _ioc(IOC_WRITE, 0x77, ctypes.sizeof(kvm_pit_config))
KVM_IOEVENTFD = _ioc(IOC_WRITE, 0x79, ctypes.sizeof(kvm_ioeventfd))
KVM_RUN = _ioc(0, 0x80)
KVM_GET_REGS = _ioc(IOC_READ, 0x81, ctypes.sizeof(kvm_regs))
KVM_SET_REGS = _ioc(IOC_WRITE, 0x82, ctypes.sizeof(kvm_regs))
KVM_GET_SREGS = _ioc(IOC_READ, 0x83, ctypes.sizeof(kvm_sregs))
KVM_SET_SREGS = _ioc(IOC_WRITE, 0x84, ctypes.sizeof(kvm_sregs))
KVM_SET_MSRS = _ioc(IOC_WRITE, 0x89, 8)
KVM_SET_SIGNAL_MASK = _ioc(IOC_WRITE, 0x8B, 4)
KVM_GET_LAPIC = _ioc(IOC_READ, 0x8E, ctypes.sizeof(kvm_lapic_state))
KVM_SET_LAPIC = _ioc(IOC_WRITE, 0x8F, ctypes.sizeof(kvm_lapic_state))
KVM_SET_CPUID2 = _ioc(IOC_WRITE, 0x90, 8)
