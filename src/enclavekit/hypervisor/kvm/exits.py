# SPDX-License-Identifier: Apache-2.0
"""What is done when a vCPU leaves the guest: served by the bus, or an end, in words and with registers.

Source: linux: Documentation/virt/kvm/api.rst, section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from enclavekit.linux import kvm_abi as abi
from enclavekit.linux.kvm_abi import ExitReason

ENOSYS = 1000
"""KVM_ENOSYS: how a hypercall that does not exist is answered (linux: include/uapi/linux/kvm_para.h)."""

RESUMED = frozenset(
    {ExitReason.INTR, ExitReason.IRQ_WINDOW_OPEN, ExitReason.SET_TPR, ExitReason.TPR_ACCESS, ExitReason.X86_BUS_LOCK}
)
"""Nothing to do: the guest goes on."""


class Bus(Protocol):
    """Ports and memory-mapped registers. Bytes are little-endian."""

    def read_port(self, port: int, size: int) -> bytes:
        """IN."""

    def write_port(self, port: int, data: bytes) -> None:
        """OUT."""

    def read_memory(self, address: int, size: int) -> bytes:
        """A read where no memory is."""

    def write_memory(self, address: int, data: bytes) -> None:
        """A write where no memory is, or memory that cannot be written."""


class Cpu(Protocol):
    """What a report needs of a vCPU."""

    def registers(self) -> abi.kvm_regs:
        """General registers."""

    def system_registers(self) -> abi.kvm_sregs:
        """Segments and control registers."""


@dataclass(frozen=True, slots=True)
class End:
    """Of the machine. ``failure`` says what went wrong; None when the guest wanted it so."""

    reason: str
    failure: str | None = None


def handle(run: abi.kvm_run, shared: memoryview, bus: Bus, report: Callable[[], str]) -> End | None:
    """Serve one exit; None when the guest goes on. ``report`` gives the registers."""
    reason = run.exit_reason
    if reason == ExitReason.IO:
        _port(run.io, shared, bus)
    elif reason == ExitReason.MMIO:
        _memory(run.mmio, bus)
    elif reason == ExitReason.HYPERCALL:
        run.hypercall.ret = (1 << 64) - ENOSYS
    elif reason in (ExitReason.X86_RDMSR, ExitReason.X86_WRMSR):
        run.msr.error = 1  # which is a general protection fault
    elif reason == ExitReason.SHUTDOWN:
        return End("triple fault")
    elif reason == ExitReason.SYSTEM_EVENT:
        return _system_event(run.system_event, report)
    elif reason not in RESUMED:
        return End("failure", f"{_why(run)}; {report()}")
    return None


def _port(io: abi.kvm_exit_io, shared: memoryview, bus: Bus) -> None:
    start = io.data_offset
    for position in range(start, start + io.count * io.size, io.size):
        if io.direction == abi.KVM_EXIT_IO_OUT:
            bus.write_port(io.port, bytes(shared[position : position + io.size]))
        else:
            shared[position : position + io.size] = bus.read_port(io.port, io.size)


def _memory(mmio: abi.kvm_exit_mmio, bus: Bus) -> None:
    if mmio.is_write:
        bus.write_memory(mmio.phys_addr, bytes(mmio.data[: mmio.len]))
    else:
        mmio.data[: mmio.len] = list(bus.read_memory(mmio.phys_addr, mmio.len))


def _system_event(event: abi.kvm_exit_internal, report: Callable[[], str]) -> End:
    match event.suberror:  # which is its type
        case abi.KVM_SYSTEM_EVENT_SHUTDOWN:
            return End("power-off")
        case abi.KVM_SYSTEM_EVENT_RESET:
            return End("reset")
        case kind:
            name = "the guest crashed" if kind == abi.KVM_SYSTEM_EVENT_CRASH else f"system event {kind}"
            return End("failure", f"{name}; {report()}")


def _why(run: abi.kvm_run) -> str:  # noqa: PLR0911 - a reason each
    match run.exit_reason:
        case ExitReason.FAIL_ENTRY:
            return f"the processor refused to enter the guest, reason {run.fail_entry.hardware_entry_failure_reason:#x}"
        case ExitReason.INTERNAL_ERROR:
            return _internal(run.internal)
        case ExitReason.UNKNOWN:
            return f"KVM does not know the processor's exit reason {run.words[0]:#x}"
        case ExitReason.MEMORY_FAULT:
            return f"memory fault at {run.words[1]:#x}, {run.words[2]:#x} bytes"
        case ExitReason.EXCEPTION:
            return f"exception {run.words[0] & 0xFFFFFFFF}, error code {run.words[0] >> 32:#x}"
        case ExitReason.HLT:
            return "halted, where KVM should have waited for an interrupt"
    try:
        name = ExitReason(run.exit_reason).name
    except ValueError:
        name = "not known"
    return f"KVM exit reason {run.exit_reason} ({name}), which was not asked for"


def _internal(internal: abi.kvm_exit_internal) -> str:
    what = abi.KVM_INTERNAL_ERRORS.get(internal.suberror, f"suberror {internal.suberror}")
    data = bytes(internal.data)[: 8 * min(internal.ndata, 16)]
    if internal.suberror == abi.KVM_INTERNAL_ERROR_EMULATION and internal.ndata >= 3 and data[0] & 1:
        return f"KVM internal error: {what}: {data[9 : 9 + min(data[8], 15)].hex(' ')}"
    words = " ".join(f"{word:#x}" for word in list(internal.data)[: min(internal.ndata, 16)])
    return f"KVM internal error: {what}" + (f", data {words}" if words else "")


def register_report(number: int, cpu: Cpu) -> str:
    """One line: where vCPU ``number`` was."""
    try:
        registers, system = cpu.registers(), cpu.system_registers()
    except OSError as error:
        return f"vCPU {number}: registers cannot be read: {error.strerror}"
    general = " ".join(f"{name}={getattr(registers, name):x}" for name in ("rip", "rflags", *abi.GENERAL_REGISTERS))
    segments = " ".join(
        f"{name}={segment.selector:x}:{segment.base:x}"
        for name in ("cs", "ds", "ss")
        for segment in [getattr(system, name)]
    )
    control = " ".join(f"{name}={getattr(system, name):x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer"))
    return f"vCPU {number}: {general} {segments} {control}"
