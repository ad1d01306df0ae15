# SPDX-License-Identifier: Apache-2.0
"""The carrier ``kvm`` with guests made by hand: what any /dev/kvm can run, however slowly.

Kernels on it are booted in ``test_nested.py``, where there is a KVM of hardware's kind.
"""

from __future__ import annotations

import array
import fcntl
import gc
import io
import mmap
import os
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from struct import pack

import pytest
from test_loader import changed, image, sealed

from enclavekit.eif import Discovery
from enclavekit.errors import CarrierError, EnclaveConnectionError
from enclavekit.hypervisor.contract import ImageKind, LaunchSpec, Mode
from enclavekit.hypervisor.kvm.carrier import KvmCarrier, KvmEnclave
from enclavekit.hypervisor.kvm.exits import End
from enclavekit.hypervisor.kvm.machine import DeviceBus, Machine, PortRange, Window
from enclavekit.hypervisor.kvm.ports import I8042
from enclavekit.hypervisor.launch import launch
from enclavekit.linux.kvm import Vm
from enclavekit.platform import rom as platform_rom
from enclavekit.platform.machine import BootProtocol

pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm for this user")

MIB = 1 << 20
TIMEOUT_S = 60.0
CODE = 0x1000
KERNEL_ADDRESS = 0x200000
ROM_SIZE = 0x10000
FAR_JUMP = b"\xea"
SPIN = b"\xeb\xfe"
RESET = b"\xb0\xfe\xe6\x64" + SPIN  # mov al, 0xfe; out 0x64, al
GUEST = Path(__file__).parent / "guest"
GUEST_ADDRESS, MODE_ADDRESS = 0x10000, 0x600
FREESTANDING = (
    *("-target", "x86-freestanding-none", "-mcpu=i386", "-std=c11", "-Os", "-ffreestanding", "-fno-pic"),
    *("-fno-stack-protector", "-fno-builtin", "-fno-sanitize=all", "-mno-sse", "-mno-mmx", "-mno-80387", "-g0"),
)


def rom(segment: int, offset: int) -> mmap.mmap:
    """At the reset vector, a jump to real-mode code in RAM."""
    made = mmap.mmap(-1, ROM_SIZE)
    made[0xFFF0:0xFFF5] = FAR_JUMP + pack("<HH", offset, segment)
    return made


class Bare:
    """A machine of a page of code, 64 KiB of RAM, one port that keeps what is written, and one window."""

    def __init__(self, code: bytes) -> None:
        self.machine = Machine(Vm())
        memory = mmap.mmap(-1, 0x10000)
        memory[CODE : CODE + len(code)] = code
        firmware = rom(0, CODE)
        self.machine.add_memory(0, memory)
        self.machine.add_memory(0x20000, firmware, readonly=True)
        self.machine.add_memory((1 << 32) - ROM_SIZE, firmware, readonly=True)
        self.memory = memory
        self.out: list[int] = []
        self.input = iter(range(0x41, 0x60))
        self.mmio: list[tuple[int, bytes]] = []
        keyboard = I8042(lambda: self.machine.stop(End("reset")))
        ports = [
            PortRange(0x3F8, 2, lambda _: next(self.input), lambda _, value: self.out.append(value)),
            PortRange(0x64, 1, lambda _: 0, lambda _, value: keyboard.command(value)),
        ]
        window = Window(
            0xA0000,
            0x1000,
            lambda offset, size: bytes([0x50 + offset]) * size,
            lambda offset, data: self.mmio.append((offset, data)),
        )
        self.bus = DeviceBus(ports, [window])

    def run(self, cpus: int = 1) -> End:
        self.machine.start(cpus, self.bus)
        self.wait()
        assert self.machine.end is not None
        return self.machine.end

    def wait(self) -> None:
        poller = select.poll()
        poller.register(self.machine.ended_fd, select.POLLHUP)
        assert poller.poll(TIMEOUT_S * 1000), "the machine runs on"

    def close(self) -> None:
        self.machine.halt()
        self.machine.close()


@pytest.fixture
def bare() -> Iterator[Callable[[bytes], Bare]]:
    made: list[Bare] = []

    def make(code: bytes) -> Bare:
        made.append(Bare(code))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_ports_one_by_one_and_in_strings(bare: Callable[[bytes], Bare]) -> None:
    # mov dx, 0x3f8; in al, dx; out dx, al; mov ax, 0x4241; out dx, ax
    code = b"\xba\xf8\x03\xec\xee\xb8\x41\x42\xef"
    # mov di, 0x3000; mov cx, 3; cld; rep insb; mov si, 0x3000; mov cx, 3; rep outsb
    code += b"\xbf\x00\x30\xb9\x03\x00\xfc\xf3\x6c\xbe\x00\x30\xb9\x03\x00\xf3\x6e"
    machine = bare(code + RESET)
    assert machine.run() == End("reset")
    assert bytes(machine.out) == b"A" + b"AB" + b"BCD"
    assert machine.memory[0x3000:0x3003] == b"BCD"


def test_memory_mapped_registers_and_nothing_there(bare: Callable[[bytes], Bare]) -> None:
    # mov ax, 0xa000; mov ds, ax; mov ax, [4]; mov [8], ax; mov bx, 0x9000; mov ds, bx; mov al, [0]
    # mov dx, 0x3f8; out dx, al
    code = b"\xb8\x00\xa0\x8e\xd8\xa1\x04\x00\xa3\x08\x00\xbb\x00\x90\x8e\xdb\xa0\x00\x00\xba\xf8\x03\xee"
    machine = bare(code + RESET)
    assert machine.run() == End("reset")
    assert machine.mmio == [(8, b"\x54\x54")]
    assert machine.out == [0xFF]


def test_a_write_to_rom_changes_nothing(bare: Callable[[bytes], Bare]) -> None:
    # mov ax, 0x2fff; mov ds, ax; mov byte [0], 0; mov al, [0]; mov dx, 0x3f8; out dx, al
    code = b"\xb8\xff\x2f\x8e\xd8\xc6\x06\x00\x00\x00\xa0\x00\x00\xba\xf8\x03\xee"
    machine = bare(code + RESET)
    assert machine.run() == End("reset")
    assert machine.out == [0xEA]


@pytest.mark.parametrize("code", [SPIN, b"\xf4" + SPIN, b"\xe4\x80" + b"\xeb\xfc"], ids=["spins", "halts", "exits"])
@pytest.mark.parametrize("cpus", [1, 2])
def test_any_thread_stops_it_whatever_it_does(bare: Callable[[bytes], Bare], code: bytes, cpus: int) -> None:
    machine = bare(code)
    machine.machine.start(cpus, machine.bus)
    stopper = threading.Thread(target=machine.machine.stop, args=(End("asked"),))
    stopper.start()
    machine.wait()
    stopper.join()
    machine.machine.stop(End("too late"))
    assert machine.machine.end == End("asked")
    assert machine.machine.cpu_s >= 0


def test_an_error_in_a_device_is_a_failure_with_its_name(bare: Callable[[bytes], Bare]) -> None:
    machine = bare(b"\xba\xf8\x03\xec" + SPIN)
    machine.input = iter(())  # nothing to read
    assert machine.run() == End("failure", "vCPU 0: RuntimeError: generator raised StopIteration")


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """guest/kvm.c as a flat binary."""
    work = tmp_path_factory.mktemp("guest")
    zig = [sys.executable, "-m", "ziglang"]
    objects = [work / f"{name}.o" for name in ("kvm.S", "kvm.c")]
    for made in objects:
        subprocess.run([*zig, "cc", *FREESTANDING, "-c", "-o", made, GUEST / made.stem], check=True)
    elf, flat = work / "kvm.elf", work / "kvm.bin"
    subprocess.run([*zig, "ld.lld", "-m", "elf_i386", "-T", GUEST / "kvm.ld", "-o", elf, *objects], check=True)
    subprocess.run([*zig, "objcopy", "-O", "binary", elf, flat], check=True)
    return flat.read_bytes()


def start(directory: Path, guest: bytes, mode: str, monkeypatch: pytest.MonkeyPatch, *, cpus: int = 1) -> KvmEnclave:
    """An enclave whose ROM jumps to the guest that lies in its memory."""
    monkeypatch.setattr(platform_rom, "compose", lambda *_: bytes(rom(GUEST_ADDRESS >> 4, 0)[:]))
    enclave = KvmCarrier().create(LaunchSpec("00000000", 16 * MIB, cpus, 0, Discovery.CMDLINE, directory))
    (region,) = enclave.allocate(16 * MIB)
    region.buffer[GUEST_ADDRESS : GUEST_ADDRESS + len(guest)] = guest
    region.buffer[MODE_ADDRESS] = ord(mode)
    enclave.set_user_memory_region(region)
    for _ in range(cpus):
        enclave.add_vcpu()
    enclave.start(mode=Mode.DEBUG)
    return enclave


def read_console(enclave: KvmEnclave, wanted: bytes) -> bytes:
    console, said = enclave.console(), b""
    assert console is not None
    while wanted not in said:
        assert select.select([console], [], [], TIMEOUT_S)[0], f"{said!r}, expected {wanted!r}"
        said += os.read(console, 4096)
    return said


def wait_for_end(enclave: KvmEnclave) -> None:
    poller = select.poll()
    poller.register(enclave.fileno(), select.POLLHUP)
    assert poller.poll(TIMEOUT_S * 1000), "the machine runs on"


def test_vsock_echo(tmp_path: Path, guest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kicks by ioeventfd, interrupts by irqfd, and a guest that sleeps in between."""
    enclave = start(tmp_path, guest, "e", monkeypatch)
    try:
        read_console(enclave, b"ready\n")
        for port in (1, 80):
            with enclave.connect(port, TIMEOUT_S) as connection:
                connection.settimeout(TIMEOUT_S)
                for size in (1, 100, 400):
                    data = bytes([size & 0x7F | 0x80]) * size
                    connection.sendall(data)
                    got = b""
                    while len(got) < size:
                        got += connection.recv(size)
                    assert got == data
        with enclave.connect(9, TIMEOUT_S) as connection:
            connection.sendall(b"q")
            assert read_console(enclave, b"ed\n") == b"interrupted\n"
        wait_for_end(enclave)
        assert enclave.failure() is None
        statistics = enclave.statistics()
        assert (statistics.received, statistics.sent) == (1003, 1003)
        assert statistics.resident > 0
        with pytest.raises(EnclaveConnectionError, match="the enclave has ended"):
            enclave.connect(9, TIMEOUT_S)
    finally:
        enclave.close()


def test_the_second_cpu_starts_by_init_and_sipi(tmp_path: Path, guest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    enclave = start(tmp_path, guest, "s", monkeypatch, cpus=2)
    try:
        assert read_console(enclave, b"\n") == b"second\n"
        wait_for_end(enclave)
        assert enclave.failure() is None
    finally:
        enclave.close()


def test_serial_input_by_interrupts(tmp_path: Path, guest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    enclave = start(tmp_path, guest, "i", monkeypatch)
    try:
        read_console(enclave, b"type\n")
        console = enclave.console()
        assert console is not None
        text = b"more than a port without a FIFO takes at once."
        os.write(console, text)
        assert read_console(enclave, b".") == text
    finally:
        enclave.close()


def test_a_console_that_nobody_reads_holds_the_guest_and_not_the_end(tmp_path: Path) -> None:
    """mov dx, 0x3f8; 1: out dx, al; jmp 1b, entered as a kernel is."""
    enclave = boot_kernel(b"\xba\xf8\x03\x00\x00\xee\xeb\xfd", tmp_path)
    try:
        end = time.monotonic() + TIMEOUT_S
        before = -1
        while (now := waiting_bytes(enclave)) != before or now == 0:  # until no more comes
            assert time.monotonic() < end
            before = now
            threading.Event().wait(0.2)
    finally:
        enclave.close()


def waiting_bytes(enclave: KvmEnclave) -> int:
    count = array.array("i", [0])
    console = enclave.console()
    assert console is not None
    fcntl.ioctl(console, termios.FIONREAD, count)
    return count[0]


def boot_kernel(code: bytes, directory: Path) -> KvmEnclave:
    """An EIF whose kernel is ``code`` at its 32-bit entry."""
    return boot_image({0x400: code}, BootProtocol.EIF, directory)


def boot_image(parts: Mapping[int, bytes], protocol: BootProtocol, directory: Path) -> KvmEnclave:
    """An EIF with these bytes at these offsets of its kernel."""
    data = image()
    kernel = 548 + 12
    fields = {0x248: pack("<II", 0, 0x400), 0x258: pack("<QI", KERNEL_ADDRESS, 0x1000)}
    for offset, part in {**fields, **parts}.items():
        data[kernel + offset : kernel + offset + len(part)] = part
    data = sealed(data)
    spec = LaunchSpec("00000000", 64 * MIB, 1, len(data), Discovery.CMDLINE, directory, boot=protocol)
    enclave = launch(KvmCarrier().create, spec, io.BytesIO(data), mode=Mode.DEBUG)
    assert isinstance(enclave, KvmEnclave)
    return enclave


def vmlinux(code: bytes) -> bytes:
    """One segment at KERNEL_ADDRESS, which is code, and the note that says to enter it there."""
    note = pack("<III4sI", 4, 4, 18, b"Xen\0", KERNEL_ADDRESS)
    where = 64 + 2 * 56
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = pack("<IIQQQQQQ", 1, 5, where + len(note), 0, KERNEL_ADDRESS, len(code), len(code), 1)
    notes = pack("<IIQQQQQQ", 4, 4, where, 0, 0, len(note), len(note), 1)
    return head + load + notes + note + code


SAY_K = b"\xba\xf8\x03\0\0\xb0K\xee"  # mov edx, 0x3f8; mov al, 'K'; out dx, al
SAY_LOADER = b"\x8a\x86\x10\x02\0\0\xee"  # mov al, [esi + 0x210], the loader's type; out dx, al
SAY_MAGIC = b"\x8a\x03\xee"  # mov al, [ebx], hvm_start_info's first byte; out dx, al
SETUP = (
    b"\xba\xf8\x03\xb0K\xee\xa0\x10\x02\xee"  # the same in real mode: the header is in the data segment
    b"\x66\xb8\x20\xe8\0\0\x66\xba\x50\x41\x4d\x53\x66\x31\xdb\x66\xb9\x14\0\0\0\xbf\0\x30\xcd\x15"  # E820
    b"\xba\xf8\x03\x88\xc8\xee"  # how long the entry is: mov al, cl; out dx, al
) + RESET


@pytest.mark.parametrize(
    ("protocol", "parts", "says"),
    [
        (BootProtocol.EIF, {0x400: SAY_K + SAY_LOADER + RESET}, b"K\xff"),
        (BootProtocol.LINUX, {0x400: SAY_K + SAY_LOADER + RESET}, b"K\xff"),
        (BootProtocol.PVH, {0x400: vmlinux(SAY_K + SAY_MAGIC + RESET)}, b"K\x78"),
        (BootProtocol.REALMODE, {0x200: b"\xeb\x6e", 0x270: SETUP}, b"K\xff\x14"),
    ],
)
def test_the_rom_enters_the_kernel(
    protocol: BootProtocol, parts: Mapping[int, bytes], says: bytes, tmp_path: Path
) -> None:
    """Each protocol's own entry, with what it is promised there."""
    enclave = boot_image(parts, protocol, tmp_path)
    try:
        assert read_console(enclave, says[-1:]) == says
        wait_for_end(enclave)
        assert enclave.failure() is None
    finally:
        enclave.close()


def test_a_guest_that_cannot_go_on_is_a_triple_fault_or_told_with_registers(tmp_path: Path) -> None:
    """The loader's refusal ends in an exception without an IDT; a KVM that emulates says that it cannot do that."""
    data = sealed(changed(0, b"xxxx"))
    spec = LaunchSpec("00000000", 64 * MIB, 1, len(data), Discovery.CMDLINE, tmp_path)
    enclave = launch(KvmCarrier().create, spec, io.BytesIO(data), mode=Mode.DEBUG)
    assert isinstance(enclave, KvmEnclave)
    try:
        wait_for_end(enclave)
        assert read_console(enclave, b"\n") == b"loader: image magic: got 0x78787878, expected 0x2e656966\r\n"
        failure = enclave.failure()
        if failure is not None:
            assert failure.startswith("KVM internal error: an instruction that KVM cannot emulate: cc ")
            assert "; vCPU 0: rip=ffff8" in failure
    finally:
        enclave.close()


@pytest.mark.timeout(400)
def test_started_and_stopped_500_times_nothing_is_left(tmp_path: Path) -> None:
    def once() -> None:
        boot_kernel(SPIN, tmp_path).close()

    def state() -> tuple[int, int]:
        gc.collect()  # what the tests before have left
        return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("\n")

    once()
    before, maps = state(), mapped()
    for _ in range(500):
        once()
    assert state() == before
    assert mapped() < maps + 50
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_no_kvm(tmp_path: Path) -> None:
    (tmp_path / "kvm").write_text("")
    enclave = KvmCarrier(tmp_path / "kvm").create(LaunchSpec("0", MIB, 1, 0, Discovery.CMDLINE, tmp_path))
    try:
        assert enclave.image_load_offset(ImageKind.EIF) == 8 * MIB
        (region,) = enclave.allocate(16 * MIB)
        enclave.set_user_memory_region(region)
        enclave.add_vcpu()
        with pytest.raises(CarrierError, match="inappropriate ioctl for device"):
            enclave.start(mode=Mode.DEBUG)
    finally:
        enclave.close()
