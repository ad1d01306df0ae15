# SPDX-License-Identifier: Apache-2.0
"""The monitor's own chips, its bus, what CPUID says, and every exit through a kvm_run of the test's."""

from __future__ import annotations

import ctypes
from datetime import UTC, datetime

import pytest

from enclavekit.hypervisor.kvm import exits
from enclavekit.hypervisor.kvm.cpu import cpuid
from enclavekit.hypervisor.kvm.exits import End, handle, register_report
from enclavekit.hypervisor.kvm.machine import DeviceBus, PortRange, Window
from enclavekit.hypervisor.kvm.ports import I8042, Cmos
from enclavekit.hypervisor.kvm.serial import (
    DATA,
    FIFO_SIZE,
    IER,
    IIR,
    IIR_FIFO,
    IIR_NONE,
    IIR_RECEIVED,
    IIR_TIMEOUT,
    IIR_TRANSMITTER_EMPTY,
    LCR,
    LSR,
    MCR,
    MSR,
    SCRATCH,
    Serial,
)
from enclavekit.linux import kvm_abi as abi
from enclavekit.linux.kvm_abi import ExitReason


class Port:
    """A serial port and all that it does."""

    def __init__(self) -> None:
        self.sent = b""
        self.levels: list[bool] = []
        self.room_told = 0
        self.serial = Serial(self._send, self.levels.append, self._room)

    def _send(self, data: bytes) -> None:
        self.sent += data

    def _room(self) -> None:
        self.room_told += 1


def test_serial_output_without_interrupts() -> None:
    port = Port()
    for byte in b"hello":
        assert port.serial.read(LSR) == 0x60
        port.serial.write(DATA, byte)
    assert port.sent == b"hello"
    assert port.levels == []


def test_serial_transmitter_interrupts_for_every_byte() -> None:
    port = Port()
    assert port.serial.read(IIR) == IIR_NONE
    port.serial.write(IER, 2)
    assert port.levels == [True]
    assert port.serial.read(IIR) == IIR_TRANSMITTER_EMPTY
    assert (port.serial.read(IIR), port.levels) == (IIR_NONE, [True, False])
    port.serial.write(DATA, 65)
    assert port.levels == [True, False, True]
    port.serial.write(DATA, 66)  # an edge, though the first was not looked at
    assert port.levels == [True, False, True, False, True]
    port.serial.write(IER, 0)
    assert port.levels[-1] is False


def test_serial_input_without_fifo() -> None:
    port = Port()
    port.serial.write(IER, 1)
    assert port.serial.room == 1
    port.serial.receive(b"ab")
    assert port.levels == [True]
    assert port.serial.read(IIR) == IIR_RECEIVED
    assert port.serial.read(LSR) == 0x63
    assert port.serial.read(LSR) == 0x61
    assert port.serial.read(DATA) == ord("a")
    assert (port.room_told, port.levels, port.serial.read(LSR)) == (1, [True, False], 0x60)


def test_serial_fifo() -> None:
    port = Port()
    port.serial.write(IIR, 0x81)  # on, tells at 8 bytes
    port.serial.write(IER, 1)
    assert port.serial.room == FIFO_SIZE
    port.serial.receive(b"1234567")
    assert port.serial.read(IIR) == IIR_TIMEOUT | IIR_FIFO
    port.serial.receive(b"8")
    assert port.serial.read(IIR) == IIR_RECEIVED | IIR_FIFO
    assert bytes(port.serial.read(DATA) for _ in range(8)) == b"12345678"
    assert port.serial.read(DATA) == 0
    port.serial.receive(b"x")
    port.serial.write(IIR, 0x83)
    assert (port.serial.room, port.serial.read(LSR)) == (FIFO_SIZE, 0x60)


def test_serial_divisor_scratch_modem_and_loopback() -> None:
    port = Port()
    port.serial.write(LCR, 0x83)
    port.serial.write(DATA, 1)
    port.serial.write(IER, 0)
    assert [port.serial.read(register) for register in (DATA, IER, LCR)] == [1, 0, 0x83]
    port.serial.write(LCR, 3)
    port.serial.write(SCRATCH, 0x5A)
    port.serial.write(LSR, 0)
    port.serial.write(MSR, 0)
    assert [port.serial.read(register) for register in (IER, SCRATCH, MSR)] == [0, 0x5A, 0xB0]
    port.serial.write(MCR, 0x1A)  # what Linux probes with
    assert (port.serial.read(MCR), port.serial.read(MSR)) == (0x1A, 0x90)
    port.serial.write(DATA, 7)
    assert (port.sent, port.serial.read(DATA)) == (b"", 7)


def test_keyboard_controller() -> None:
    resets: list[int] = []
    chip = I8042(lambda: resets.append(1))
    for command, answer in ((0xAA, 0x55), (0xAB, 0), (0x20, 0x74), (0xD0, 1)):
        assert chip.status == 4
        chip.command(command)
        assert chip.status == 5
        assert chip.read_data() == answer
    chip.command(0x60)
    chip.write_data(0x45)
    chip.command(0x20)
    assert chip.read_data() == 0x45
    chip.write_data(0xED)  # for a keyboard that is not there
    assert (chip.status, chip.read_data()) == (4, 0)
    for _ in range(100):
        chip.command(0xAA)  # never read
    assert not resets
    chip.command(0xFE)
    assert len(resets) == 1
    chip.command(0xD1)
    chip.write_data(3)
    assert len(resets) == 1
    chip.command(0xD1)
    chip.write_data(2)
    assert len(resets) == 2


def test_clock() -> None:
    chip = Cmos(lambda: datetime(2026, 11, 29, 23, 45, 7, tzinfo=UTC))

    def at(index: int) -> int:
        chip.write(0, index)
        return chip.read(1)

    assert [at(index) for index in (0, 2, 4, 6, 7, 8, 9, 0x32)] == [7, 0x45, 0x23, 1, 0x29, 0x11, 0x26, 0x20]
    assert [at(index) for index in (0xA, 0xB, 0xC, 0xD)] == [0x26, 2, 0, 0x80]
    chip.write(0, 0x8F)  # bit 7 masks the NMI
    chip.write(1, 0x0A)
    assert (at(0x0F), at(0x10), chip.read(0)) == (0x0A, 0, 0xFF)


class FakeBus:
    def __init__(self) -> None:
        self.seen: list[tuple[str, int, bytes]] = []
        self.answer = 0

    def _next(self, size: int) -> bytes:
        self.answer += 1
        return bytes([self.answer]) * size

    def read_port(self, port: int, size: int) -> bytes:
        return self._next(size)

    def write_port(self, port: int, data: bytes) -> None:
        self.seen.append(("out", port, data))

    def read_memory(self, address: int, size: int) -> bytes:
        return self._next(size)

    def write_memory(self, address: int, data: bytes) -> None:
        self.seen.append(("write", address, data))


class Shared:
    """The pages of a vCPU, without one."""

    def __init__(self, reason: int) -> None:
        self.pages = memoryview(bytearray(8192))
        self.run = abi.kvm_run.from_buffer(self.pages)
        self.run.exit_reason = reason
        self.bus = FakeBus()

    def handle(self) -> End | None:
        return handle(self.run, self.pages, self.bus, lambda: "registers")


def test_string_output_and_input() -> None:
    shared = Shared(ExitReason.IO)
    shared.run.io = abi.kvm_exit_io(1, 2, 0x1F0, 3, 4096)
    shared.pages[4096:4102] = b"abcdef"
    assert shared.handle() is None
    assert shared.bus.seen == [("out", 0x1F0, b"ab"), ("out", 0x1F0, b"cd"), ("out", 0x1F0, b"ef")]
    shared.run.io.direction = 0
    assert shared.handle() is None
    assert bytes(shared.pages[4096:4103]) == b"\1\1\2\2\3\3\0"


def test_memory_mapped_registers() -> None:
    shared = Shared(ExitReason.MMIO)
    shared.run.mmio = abi.kvm_exit_mmio(0xD0000050, (ctypes.c_uint8 * 8)(1, 2, 3, 4, 5), 4, 1)
    assert shared.handle() is None
    assert shared.bus.seen == [("write", 0xD0000050, b"\1\2\3\4")]
    shared.run.mmio.is_write = 0
    assert shared.handle() is None
    assert bytes(shared.run.mmio.data) == b"\1\1\1\1\5\0\0\0"


@pytest.mark.parametrize("reason", sorted(exits.RESUMED))
def test_exits_after_which_the_guest_goes_on(reason: ExitReason) -> None:
    assert Shared(reason).handle() is None


def test_what_kvm_does_not_serve_is_refused_to_the_guest() -> None:
    shared = Shared(ExitReason.HYPERCALL)
    assert shared.handle() is None
    assert shared.run.hypercall.ret == (1 << 64) - 1000
    for reason in (ExitReason.X86_RDMSR, ExitReason.X86_WRMSR):
        shared = Shared(reason)
        assert shared.handle() is None
        assert shared.run.msr.error == 1


def test_ends_that_the_guest_wanted() -> None:
    assert Shared(ExitReason.SHUTDOWN).handle() == End("triple fault")
    for kind, reason in ((1, "power-off"), (2, "reset")):
        shared = Shared(ExitReason.SYSTEM_EVENT)
        shared.run.system_event.suberror = kind
        assert shared.handle() == End(reason)


NOT_ASKED = {
    ExitReason.DEBUG,
    ExitReason.NMI,
    ExitReason.IOAPIC_EOI,
    ExitReason.HYPERV,
    ExitReason.DIRTY_RING_FULL,
    ExitReason.AP_RESET_HOLD,
    ExitReason.XEN,
    ExitReason.NOTIFY,
}


@pytest.mark.parametrize("reason", sorted(NOT_ASKED))
def test_exits_that_were_not_asked_for(reason: ExitReason) -> None:
    words = f"KVM exit reason {reason:d} ({reason.name}), which was not asked for; registers"
    assert Shared(reason).handle() == End("failure", words)


def test_an_exit_of_the_future() -> None:
    assert Shared(99).handle() == End("failure", "KVM exit reason 99 (not known), which was not asked for; registers")


def failure(reason: ExitReason, *words: int) -> str:
    shared = Shared(reason)
    for index, word in enumerate(words):
        shared.run.words[index] = word
    end = shared.handle()
    assert end is not None
    assert end.reason == "failure"
    assert end.failure is not None
    assert end.failure.endswith("; registers")
    return end.failure.removesuffix("; registers")


def test_failures_say_what_kvm_said() -> None:
    assert failure(ExitReason.FAIL_ENTRY, 0x80000021, 3) == (
        "the processor refused to enter the guest, reason 0x80000021"
    )
    assert failure(ExitReason.UNKNOWN, 0x400) == "KVM does not know the processor's exit reason 0x400"
    assert failure(ExitReason.EXCEPTION, 5 << 32 | 14) == "exception 14, error code 0x5"
    assert failure(ExitReason.MEMORY_FAULT, 8, 0x1000, 0x2000) == "memory fault at 0x1000, 0x2000 bytes"
    assert failure(ExitReason.HLT) == "halted, where KVM should have waited for an interrupt"
    assert failure(ExitReason.SYSTEM_EVENT, 3) == "the guest crashed"
    assert failure(ExitReason.SYSTEM_EVENT, 9) == "system event 9"
    assert failure(ExitReason.INTERNAL_ERROR, 4 | 2 << 32, 7, 8) == (
        "KVM internal error: an exit for a reason that KVM does not know, data 0x7 0x8"
    )
    assert failure(ExitReason.INTERNAL_ERROR, 77) == "KVM internal error: suberror 77"
    assert failure(ExitReason.INTERNAL_ERROR, 77 | 0xFFFFFFFF << 32).count("0x0") == 16
    instruction = int.from_bytes(b"\x02\x0f\x0b" + bytes(5), "little")
    assert failure(ExitReason.INTERNAL_ERROR, 1 | 4 << 32, 1, instruction) == (
        "KVM internal error: an instruction that KVM cannot emulate: 0f 0b"
    )


def test_every_exit_reason_is_in_some_test() -> None:
    served = {ExitReason.IO, ExitReason.MMIO, ExitReason.HYPERCALL, ExitReason.X86_RDMSR, ExitReason.X86_WRMSR}
    ends = {
        ExitReason.SHUTDOWN,
        ExitReason.SYSTEM_EVENT,
        ExitReason.FAIL_ENTRY,
        ExitReason.UNKNOWN,
        ExitReason.EXCEPTION,
        ExitReason.MEMORY_FAULT,
        ExitReason.HLT,
        ExitReason.INTERNAL_ERROR,
    }
    assert served | ends | NOT_ASKED | exits.RESUMED == set(ExitReason)


class FakeCpu:
    def registers(self) -> abi.kvm_regs:
        return abi.kvm_regs(rip=0xFFF0, rax=0x12)

    def system_registers(self) -> abi.kvm_sregs:
        found = abi.kvm_sregs(cr0=0x11)
        found.cs.selector, found.cs.base = 0xF000, 0xFFFF0000
        return found


class DeadCpu(FakeCpu):
    def registers(self) -> abi.kvm_regs:
        raise OSError(5, "Input/output error")


def test_registers_in_a_line() -> None:
    line = register_report(1, FakeCpu())
    assert line.startswith("vCPU 1: rip=fff0 rflags=0 rax=12 rbx=0 ")
    assert " cs=f000:ffff0000 ds=0:0 ss=0:0 cr0=11 cr2=0 cr3=0 cr4=0 efer=0" in line
    assert register_report(2, DeadCpu()) == "vCPU 2: registers cannot be read: Input/output error"


def test_bus() -> None:
    written: list[tuple[int, object]] = []
    ports = [PortRange(0x3F8, 2, lambda offset: 0x10 + offset, lambda offset, value: written.append((offset, value)))]
    windows = [
        Window(0xD0000000, 0x1000, lambda offset, size: bytes([offset]) * size, lambda *words: written.append(words))
    ]
    bus = DeviceBus(ports, windows)
    assert bus.read_port(0x3F8, 4) == b"\x10\x11\xff\xff"
    bus.write_port(0x3F9, b"\1\2")
    assert bus.read_memory(0xD0000004, 4) == b"\4" * 4
    assert bus.read_memory(0xD0000FFE, 4) == b"\xff" * 4
    assert bus.read_memory(0xC0000000, 2) == b"\xff" * 2
    bus.write_memory(0xD0000050, b"\1")
    bus.write_memory(0xF0000, b"\1")  # the ROM
    assert written == [(1, 1), (0x50, b"\1")]


def table(*entries: tuple[int, ...]) -> abi.kvm_cpuid2:
    made = abi.kvm_cpuid2(nent=len(entries))
    for index, entry in enumerate(entries):
        made.entries[index] = abi.kvm_cpuid_entry2(*entry)
    return made


def answers(made: abi.kvm_cpuid2) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    entries = made.entries[: made.nent]
    return {(one.function, one.index): (one.eax, one.ebx, one.ecx, one.edx) for one in entries}


def test_cpuid_names_each_cpu() -> None:
    ones = (0xFFFFFFFF,) * 4
    host = table((1, 0, 0, 5, 0xFFFF1234, 1, 0), (4, 0, 1, *ones), (0xB, 0, 1, *ones), (0x80000008, 0, 0, *ones),
                 (0x8000001E, 0, 0, *ones), (0x40000000, 0, 0, *ones))  # fmt: skip
    found = answers(cpuid(3, 4, host, tsc_deadline=True))
    assert found[1, 0] == (5, 0x03041234, 1 << 31 | 1 << 24 | 1, 1 << 28)
    assert found[4, 0][0] == 3 << 26 | 0x3FFF
    assert found[0xB, 0] == (0, 1, 0x100, 3)
    assert found[0xB, 1] == (2, 4, 0x201, 3)
    assert found[0x80000008, 0][2] & 0xF0FF == 2 << 12 | 3
    assert found[0x8000001E, 0][:3] == (3, 3, 0)
    assert found[0x40000000, 0] == ones
    alone = answers(cpuid(0, 1, host, tsc_deadline=False))
    assert alone[1, 0] == (5, 0x00011234, 1 << 31 | 1, 0)
    assert host.nent == 6
