# SPDX-License-Identifier: Apache-2.0
"""/dev/kvm: virtual machines, their vCPUs, and a tiny guest that measures how fast KVM really runs.

Source: linux: Documentation/virt/kvm/api.rst; structures are in ``kvm_abi``. A /dev/kvm may be there that emulates
every instruction (nested page-table virtualization): it runs small guests and no Linux, so its presence says nothing.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import mmap
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

from enclavekit.linux import kvm_abi as abi

DEVICE = Path("/dev/kvm")
ALL_SIGNALS = (1 << 64) - 1

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)


def buffer_address(buffer: mmap.mmap | memoryview) -> int:
    """Where a writable buffer lies in our memory. It must be kept alive by the caller."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class Vm:
    """A virtual machine without memory, chips or CPUs at first. Methods raise ``OSError``."""

    def __init__(self, device: Path = DEVICE) -> None:
        self._cleanup = ExitStack()
        try:
            self._system = self._own(os.open(device, os.O_RDWR | os.O_CLOEXEC))
            if fcntl.ioctl(self._system, abi.KVM_GET_API_VERSION) != abi.KVM_API_VERSION:
                raise OSError(f"{device} does not speak KVM's API version {abi.KVM_API_VERSION}")
            self._fd = self._own(fcntl.ioctl(self._system, abi.KVM_CREATE_VM, 0))
        except BaseException:
            self._cleanup.close()
            raise
        self._mapped: list[mmap.mmap | memoryview] = []

    def _own(self, fd: int) -> int:
        self._cleanup.callback(os.close, fd)
        return fd

    def capability(self, number: int) -> int:
        """KVM_CHECK_EXTENSION: 0 where it has it not."""
        return fcntl.ioctl(self._system, abi.KVM_CHECK_EXTENSION, number)

    def supported_cpuid(self) -> abi.kvm_cpuid2:
        """What guests can be shown."""
        table = abi.kvm_cpuid2(nent=abi.MAX_CPUID_ENTRIES)
        fcntl.ioctl(self._system, abi.KVM_GET_SUPPORTED_CPUID, table)
        return table

    def set_memory(self, slot: int, gpa: int, buffer: mmap.mmap | memoryview, *, readonly: bool = False) -> None:
        """Map whole pages at ``gpa``, and keep them alive; a write to read-only ones is an MMIO exit."""
        region = abi.kvm_userspace_memory_region(
            slot, abi.KVM_MEM_READONLY if readonly else 0, gpa, len(buffer), buffer_address(buffer)
        )
        fcntl.ioctl(self._fd, abi.KVM_SET_USER_MEMORY_REGION, region)
        self._mapped.append(buffer)

    def reserve(self, tss: int) -> None:
        """Three pages at ``tss`` and one below, which Intel processors need for real mode; before any CPU."""
        # An unsigned long, which fcntl.ioctl does not take.
        if LIBC.ioctl(self._fd, abi.KVM_SET_TSS_ADDR, tss) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        fcntl.ioctl(self._fd, abi.KVM_SET_IDENTITY_MAP_ADDR, (tss - mmap.PAGESIZE).to_bytes(8, "little"))

    def create_chips(self) -> None:
        """Interrupt controllers (PICs, I/O APIC, local APICs) and the timer."""
        fcntl.ioctl(self._fd, abi.KVM_CREATE_IRQCHIP, 0)
        fcntl.ioctl(self._fd, abi.KVM_CREATE_PIT2, abi.kvm_pit_config(flags=abi.KVM_PIT_SPEAKER_DUMMY))

    def set_irq(self, gsi: int, level: bool) -> None:
        """Raise or lower an interrupt line."""
        fcntl.ioctl(self._fd, abi.KVM_IRQ_LINE, abi.kvm_irq_level(gsi, level))

    def irqfd(self, fd: int, gsi: int) -> None:
        """Each signal of the eventfd is an edge on the line."""
        fcntl.ioctl(self._fd, abi.KVM_IRQFD, abi.kvm_irqfd(fd, gsi))

    def ioeventfd(self, fd: int, address: int, size: int, value: int) -> None:
        """A write of ``value``, in ``size`` bytes, to a guest physical address signals the eventfd."""
        wanted = abi.kvm_ioeventfd(value, address, size, fd, abi.KVM_IOEVENTFD_FLAG_DATAMATCH)
        fcntl.ioctl(self._fd, abi.KVM_IOEVENTFD, wanted)

    def create_vcpu(self, number: int) -> Vcpu:
        """A CPU after reset: at 0xfffffff0 in real mode, or, all but the first, waiting for INIT and SIPI."""
        size = fcntl.ioctl(self._system, abi.KVM_GET_VCPU_MMAP_SIZE)
        return Vcpu(self._own(fcntl.ioctl(self._fd, abi.KVM_CREATE_VCPU, number)), size)

    def close(self) -> None:
        """When no CPU runs any more. Twice does no harm."""
        self._cleanup.close()
        self._mapped.clear()


class Vcpu:
    """One CPU; but for its making, for the one thread that runs it. Methods raise ``OSError``."""

    def __init__(self, fd: int, shared_size: int) -> None:
        self._fd = fd
        self.shared = memoryview(mmap.mmap(fd, shared_size))
        self.run = abi.kvm_run.from_buffer(self.shared)

    def enter(self) -> bool:
        """Run the guest until it exits; False when it was only interrupted, by a signal or KVM itself."""
        try:
            fcntl.ioctl(self._fd, abi.KVM_RUN, 0)  # gives the GIL up
        except (InterruptedError, BlockingIOError):
            return False
        return True

    def interruptible_by(self, number: signal.Signals) -> None:
        """Only this signal interrupts ``enter``, while the thread itself has it blocked: so none comes too early.

        The thread must block it, and all others.
        """
        mask = abi.kvm_signal_mask(8, ALL_SIGNALS & ~(1 << (number - 1)))
        fcntl.ioctl(self._fd, abi.KVM_SET_SIGNAL_MASK, mask)

    def set_cpuid(self, table: abi.kvm_cpuid2) -> None:
        """What CPUID answers."""
        fcntl.ioctl(self._fd, abi.KVM_SET_CPUID2, table)

    def set_msr(self, index: int, value: int) -> bool:
        """False where KVM does not take it."""
        wanted = abi.kvm_msrs(1)
        wanted.entries[0] = abi.kvm_msr_entry(index, 0, value)
        return bool(fcntl.ioctl(self._fd, abi.KVM_SET_MSRS, wanted) == 1)

    def registers(self) -> abi.kvm_regs:
        """General registers."""
        found = abi.kvm_regs()
        fcntl.ioctl(self._fd, abi.KVM_GET_REGS, found)
        return found

    def set_registers(self, registers: abi.kvm_regs) -> None:
        """General registers."""
        fcntl.ioctl(self._fd, abi.KVM_SET_REGS, registers)

    def system_registers(self) -> abi.kvm_sregs:
        """Segments and control registers."""
        found = abi.kvm_sregs()
        fcntl.ioctl(self._fd, abi.KVM_GET_SREGS, found)
        return found

    def set_system_registers(self, registers: abi.kvm_sregs) -> None:
        """Segments and control registers."""
        fcntl.ioctl(self._fd, abi.KVM_SET_SREGS, registers)

    def lapic(self) -> abi.kvm_lapic_state:
        """The local APIC's registers."""
        found = abi.kvm_lapic_state()
        fcntl.ioctl(self._fd, abi.KVM_GET_LAPIC, found)
        return found

    def set_lapic(self, state: abi.kvm_lapic_state) -> None:
        """The local APIC's registers."""
        fcntl.ioctl(self._fd, abi.KVM_SET_LAPIC, state)


LOOP_ADDRESS = 0x1000
LOOP_ITERATIONS = 20_000
# mov cx, iterations; 1: dec cx; jnz 1b; hlt
LOOP = b"\xb9" + LOOP_ITERATIONS.to_bytes(2, "little") + b"\x49\x75\xfd\xf4"
LOOP_INSTRUCTIONS = 2 * LOOP_ITERATIONS
TRIES, PATIENCE_S = 5, 0.03


def measure_speed(device: Path = DEVICE) -> float:
    """Instructions a second of a small loop in real mode: some 1e9 with hardware, 2e6 where KVM emulates.

    Raises ``OSError`` where KVM is absent, closed to this user, or cannot run even this.
    """
    vm = Vm(device)
    try:
        memory = mmap.mmap(-1, 0x10000)
        memory[LOOP_ADDRESS : LOOP_ADDRESS + len(LOOP)] = LOOP
        vm.set_memory(0, 0, memory)
        vcpu = vm.create_vcpu(0)
        system_registers = vcpu.system_registers()
        system_registers.cs.base, system_registers.cs.selector = 0, 0
        vcpu.set_system_registers(system_registers)
        # The best of a few: one preemption on a busy machine must not look like emulation.
        best_s, end = math.inf, time.perf_counter() + PATIENCE_S
        for _ in range(TRIES):
            vcpu.set_registers(abi.kvm_regs(rip=LOOP_ADDRESS, rflags=2))
            start = time.perf_counter()
            while not vcpu.enter():
                pass
            best_s = min(best_s, time.perf_counter() - start)
            reason = vcpu.run.exit_reason
            if reason != abi.ExitReason.HLT:
                raise OSError(f"{device}: the probe's guest left with exit reason {reason}, not {abi.ExitReason.HLT:d}")
            if time.perf_counter() > end:
                break
        return LOOP_INSTRUCTIONS / best_s
    finally:
        vm.close()
