# SPDX-License-Identifier: Apache-2.0
"""How fast vsock is: throughput both ways, round trips and connections, ours and the Rust vhost-device-vsock's.

One guest program (bench/guest/vsock.c) in one image per kernel; the host's side, in a process of its own, is the same
for both devices. They take turns, case by case, one guest beside the other, because the speed of a shared machine
changes from second to second: figures are medians, and a ratio is the median of those of the turns. The other device
needs a guest kernel that it works with, Debian 12's 6.1:

    python bench/vsock.py [--rounds N] [--integrity GIB] [--only WORD] [--other vhost-device-vsock --kernel vmlinuz
        --modules DIR]

Without --other, ours alone with the runtime's kernel. A case in which the other device stalls is left out of the rounds
that follow, so that they take a bounded time: about a minute each, and TIMEOUT_S for each case that stalls. CRC-32 of
all that went each way proves the integrity. Debian's package vhost-device-vsock has the program,
linux-image-6.1*-cloud-amd64 kernel and modules.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from enclavekit import eif
from enclavekit.eif import Arch, BytesContent, FileContent, Section, SectionType
from enclavekit.eif.layout import HEADER_SIZE, SECTION_HEADER_SIZE
from enclavekit.enclave.run import plan
from enclavekit.environment import data_directory, qemu_environment
from enclavekit.hypervisor.accel import Accel
from enclavekit.hypervisor.contract import LaunchSpec, Mode
from enclavekit.hypervisor.launch import launch
from enclavekit.hypervisor.qemu import QemuCarrier, QemuEnclave
from enclavekit.image.boot import boot_ramdisk
from enclavekit.image.kernel import open_kernel
from enclavekit.image.modules import resolve
from enclavekit.runtime import Kernel, find_kernel, find_qemu
from enclavekit.virtio.host_sockets import SOCKET_NAME, socket_path

GUEST = Path(__file__).with_name("guest") / "vsock.c"
CMDLINE = "reboot=k panic=1 pci=off console=ttyS0 quiet i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd"
MEMORY = 256 << 20
CONTROL, DATA = 5000, 5001
BUFFER = 1 << 20
CHUNKS = (4 << 10, 64 << 10, 256 << 10)
STREAMS = (1, 32)
SIZE = 64 << 20
PINGS, DIALS, MANY_DIALS = 1000, 300, 10_000
TIMEOUT_S, BOOT_TIMEOUT_S, LONG_TIMEOUT_S = 10, 60, 3600
MAX_FAILED_BOOTS = 3
TURNS = 5
GOALS = {"guest to host": "at least 1.3", "host to guest": "at least 1.0", "round trip": "at most 1.0"}


class OtherDevice(QemuEnclave):
    """An enclave with somebody else's vsock device."""

    program = ""

    def _start_device(self, cid: int, heartbeat: int) -> socket.socket:
        del heartbeat
        directory = self._spec.directory
        process = subprocess.Popen(
            [
                *(self.program, "--guest-cid", str(cid), "--socket", directory / "device.sock"),
                *("--uds-path", directory / SOCKET_NAME),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._cleanup.callback(process.wait)
        self._cleanup.callback(process.kill)
        ours = socket.socket(socket.AF_UNIX)
        self._cleanup.callback(ours.close)
        for _ in range(100):
            try:
                ours.connect(str(directory / "device.sock"))
                break
            except OSError:
                time.sleep(0.05)
        return ours


def enclave(directory: Path, program: str) -> None:
    """In a process of its own: run directory/image until standard input ends."""
    qemu = find_qemu(data_directory() / "runtime")
    carrier = QemuCarrier(qemu.command, {**qemu_environment(), **qemu.environment}, qemu.version, Accel.TCG)
    OtherDevice.program = program
    with (directory / "image").open("rb") as file:
        planned = plan(file, MEMORY, datetime.now(UTC))
        spec = LaunchSpec(
            enclave_id="bench",
            memory=MEMORY,
            cpus=1,
            image_size=planned.image.size,
            discovery=planned.discovery,
            directory=directory,
        )
        file.seek(0)
        create = (lambda spec: OtherDevice(carrier, spec)) if program else carrier.create
        with_device = launch(create, spec, file, mode=Mode.PRODUCTION, cid=16)
    try:
        sys.stdin.buffer.read()
    finally:
        with_device.close()


def guest_program(directory: Path) -> bytes:
    """bench/guest/vsock.c, by the compiler that also compiles init."""
    made = directory / "guest"
    command = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-musl", "-O2", "-static", "-s", "-w"]
    subprocess.run([*command, "-o", made, GUEST], check=True)
    return made.read_bytes()


def make_image(kernel: Kernel, program: bytes, path: Path) -> None:
    """An EIF of kernel, modules, and the program as init."""
    with kernel.path.open("rb") as file, path.open("w+b") as out:
        release = open_kernel(file, kernel.path).release
        ramdisk = boot_ramdisk(program, resolve(kernel.modules, arch=Arch.X86_64, release=release).modules)
        content = FileContent(file, 0, kernel.path.stat().st_size, str(kernel.path))
        offset = HEADER_SIZE + 3 * SECTION_HEADER_SIZE + content.size + len(CMDLINE)
        metadata = b"{}" + b" " * (-(offset + 2 + SECTION_HEADER_SIZE) % 4096)
        sections = [
            Section(SectionType.KERNEL, content),
            Section(SectionType.CMDLINE, BytesContent(CMDLINE.encode())),
            Section(SectionType.METADATA, BytesContent(metadata)),
            Section(SectionType.RAMDISK, ramdisk),
        ]
        eif.write(out, sections, arch=Arch.X86_64)


class Guest:
    """A running guest, told what to do over its control connection."""

    def __init__(self, control: socket.socket, data: socket.socket, pid: int) -> None:
        self.pid = pid
        self._control = control
        self._file = control.makefile("rw", encoding="ascii", newline="\n")
        self._data = data
        control.settimeout(BOOT_TIMEOUT_S)
        self._hear("ready")
        control.settimeout(TIMEOUT_S)

    def _hear(self, word: str) -> str:
        line = self._file.readline().split()
        if not line or line[0] != word:
            raise ConnectionError(f"the guest said {line}, expected {word}")
        return line[-1]

    def _tell(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def stream(self, *, sends: bool, size: int, chunk: int, streams: int, hashes: bool = False) -> float:
        """MB/s of ``size`` bytes in all."""
        each = size // streams // 8 * 8
        timeout_s = LONG_TIMEOUT_S if hashes else TIMEOUT_S
        crcs: list[Crc] = []
        self._control.settimeout(timeout_s)
        start = time.perf_counter()
        self._tell(f"{'send' if sends else 'take'} {each} {chunk} {streams} {int(hashes)}")
        connections = [self._data.accept()[0] for _ in range(streams)]
        with ExitStack() as stack:
            ends: dict[socket.socket, Iterator[int]] = {}
            for connection in connections:
                stack.enter_context(connection).setblocking(False)
                crcs.append(crc := Crc(wanted=hashes))
                ends[connection] = _take(connection, each, crc) if sends else _give(connection, each, chunk, crc)
            _serve(ends, timeout_s)
        passed = time.perf_counter() - start
        said = int(self._hear("sent" if sends else "took"))
        if hashes and [crc.value for crc in crcs] != [said]:
            raise SystemExit(
                f"INTEGRITY: {each} bytes, CRC-32 {said:08x} in the guest, {crcs[0].value:08x} on the host"
            )
        return each * streams / passed / 1e6

    def ping(self, count: int) -> float:
        """Median microseconds of a round trip of 64 bytes."""
        self._control.settimeout(TIMEOUT_S)
        self._tell(f"ping {count}")
        connection, _ = self._data.accept()
        times = []
        with connection:
            connection.settimeout(TIMEOUT_S)
            for _ in range(count):
                start = time.perf_counter()
                connection.sendall(bytes(64))
                connection.recv(64, socket.MSG_WAITALL)
                times.append(time.perf_counter() - start)
        self._hear("done")
        return statistics.median(times) * 1e6

    def dial(self, count: int) -> float:
        """Connections per second, one after the other."""
        self._control.settimeout(TIMEOUT_S + count // 100)
        start = time.perf_counter()
        self._tell(f"dial {count}")
        for _ in range(count):
            self._data.accept()[0].close()
        self._hear("done")
        return count / (time.perf_counter() - start)


def cases() -> dict[str, Callable[[Guest], float]]:
    """What is measured, by its name."""
    found: dict[str, Callable[[Guest], float]] = {}
    for sends, way in ((True, "guest to host"), (False, "host to guest")):
        for chunk in CHUNKS:
            for streams in STREAMS:
                name = f"{way}, {chunk >> 10} KiB, {streams} stream{'s' if streams > 1 else ''} (MB/s)"
                size = SIZE // 4 if chunk == CHUNKS[0] else SIZE
                found[name] = partial(Guest.stream, sends=sends, size=size, chunk=chunk, streams=streams)
    found["round trip (us)"] = partial(Guest.ping, count=PINGS)
    found["connections (1/s)"] = partial(Guest.dial, count=DIALS)
    return found


class Crc:
    """A running CRC-32, if it is wanted."""

    def __init__(self, *, wanted: bool) -> None:
        self.value = 0
        self._wanted = wanted

    def add(self, part: memoryview) -> None:
        if self._wanted:
            self.value = zlib.crc32(part, self.value)


def _serve(ends: dict[socket.socket, Iterator[int]], timeout_s: float) -> None:
    """Go on with each where it waits. One thread, so that not our own threads' turns are what is measured."""
    with selectors.DefaultSelector() as selector:
        for connection, end in ends.items():
            selector.register(connection, next(end), end)
        while selector.get_map():
            ready = selector.select(timeout_s)
            if not ready:
                raise TimeoutError("timed out")
            for key, _ in ready:
                waits_for = next(key.data, 0)
                if not waits_for:
                    selector.unregister(key.fileobj)
                elif waits_for != key.events:
                    selector.modify(key.fileobj, waits_for, key.data)


def _take(connection: socket.socket, size: int, crc: Crc) -> Iterator[int]:
    """By its size: not every device tells the end of one direction. Yields what it waits for."""
    view = memoryview(bytearray(BUFFER))
    while size:
        yield selectors.EVENT_READ
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError(f"the connection ended {size} bytes too early")
        size -= count
        crc.add(view[:count])


def _give(connection: socket.socket, size: int, chunk: int, crc: Crc) -> Iterator[int]:
    data = bytearray(os.urandom(chunk))
    view = memoryview(data)
    for at in range(0, size, chunk):
        data[:8] = at.to_bytes(8, "little")  # no two chunks are the same
        part = view[: min(chunk, size - at)]
        crc.add(part)
        while part:
            try:
                part = part[connection.send(part) :]
            except BlockingIOError:
                yield selectors.EVENT_WRITE
    yield selectors.EVENT_READ
    connection.recv(1)  # it has it all


@contextmanager
def running(image: Path, program: str = "") -> Iterator[Guest]:
    with tempfile.TemporaryDirectory() as temporary, socket.socket(socket.AF_UNIX) as ports:
        directory = Path(temporary)
        (directory / "image").symlink_to(image)
        with socket.socket(socket.AF_UNIX) as control:
            for listener, port in ((control, CONTROL), (ports, DATA)):
                with socket_path(directory, f"{SOCKET_NAME}_{port}") as path:
                    listener.bind(path)
                listener.listen(128)
                listener.settimeout(BOOT_TIMEOUT_S if port == CONTROL else TIMEOUT_S)
            command: list[str | Path] = [sys.executable, __file__, "--enclave", directory, "--other", program]
            with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
                try:
                    connection, _ = control.accept()
                    with connection:
                        yield Guest(connection, ports, process.pid)
                finally:
                    assert process.stdin is not None
                    process.stdin.close()
                    process.wait()


class StalledError(Exception):
    """A device did not do what a case asks for."""

    def __init__(self, guest: Guest, error: OSError) -> None:
        super().__init__(f"failed: {error!r}")
        self.guest = guest


def measure(case: Callable[[Guest], float], guest: Guest) -> float:
    try:
        return case(guest)
    except OSError as error:
        raise StalledError(guest, error) from error


def warm(guest: Guest) -> None:
    guest.stream(sends=True, size=8 << 20, chunk=CHUNKS[1], streams=1)


def alone(image: Path, names: list[str]) -> dict[str, float]:
    """Medians of our device's figures, in one guest."""
    with running(image) as guest:
        warm(guest)
        return {name: statistics.median(cases()[name](guest) for _ in range(TURNS)) for name in names}


def one_round(image: Path, names: list[str], program: str, pairs: dict[str, list[tuple[float, float]]]) -> None:
    """Two guests, one beside the other, measured in turns: (ours, other's) of each turn is added to ``pairs``.

    A case in which the other device stalls is taken out of ``names``, and a fresh guest goes on with the next.
    """
    left = list(names)
    failed_boots = 0
    with running(image) as ours:
        warm(ours)
        while left and failed_boots < MAX_FAILED_BOOTS:
            name = ""
            try:
                with running(image, program) as other:
                    warm(other)
                    while left:
                        name = left.pop(0)
                        case = cases()[name]
                        turns = [(measure(case, ours), measure(case, other)) for _ in range(TURNS)]
                        pairs.setdefault(name, []).extend(turns)
            except StalledError as error:
                if error.guest is ours:
                    raise
                names.remove(name)
                print(f"{program}: {name}: {error}", flush=True)
            except OSError as error:
                failed_boots += 1
                print(f"{program}: before the first case: {error!r}", flush=True)


def compare(pairs: dict[str, list[tuple[float, float]]]) -> dict[str, tuple[float, float, float]]:
    """Medians: our figure, the other's, and the ratio of a turn."""
    return {
        name: (
            round(statistics.median(ours for ours, _ in turns), 1),
            round(statistics.median(other for _, other in turns), 1),
            round(statistics.median(ours / other for ours, other in turns), 2),
        )
        for name, turns in pairs.items()
    }


def private_kib(pid: int) -> int:
    """Proportional anonymous memory of the process that has the device."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--integrity", type=float, default=10, metavar="GIB", help="each way; 0 for none")
    parser.add_argument("--other", default=shutil.which("vhost-device-vsock") or "", metavar="PROGRAM")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this in their name")
    parser.add_argument("--kernel", type=Path)
    parser.add_argument("--modules", type=Path)
    parser.add_argument("--enclave", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.enclave:
        enclave(options.enclave, options.other)
        return
    result: dict[str, object] = {"rounds": options.rounds}
    names = [name for name in cases() if options.only in name]
    names_of_both = list(names)
    with tempfile.TemporaryDirectory() as temporary:
        image, old_image = Path(temporary) / "image", Path(temporary) / "old"
        program = guest_program(Path(temporary))
        make_image(find_kernel(data_directory() / "runtime"), program, image)
        if options.other and options.kernel:
            make_image(
                Kernel(name=options.kernel.name, path=options.kernel, modules=options.modules), program, old_image
            )
            pairs: dict[str, list[tuple[float, float]]] = {}
            for _ in range(options.rounds):
                one_round(old_image, names_of_both, options.other, pairs)
            result["compared"] = compare(pairs)
            for name, (ours, other, ratio) in compare(pairs).items():
                goal = next((goal for start, goal in GOALS.items() if name.startswith(start)), "none")
                print(f"{name}: {ours} against {other}: {ratio}, goal: {goal}", flush=True)
            for way, goal in GOALS.items():
                ratios = [ratio for name, (_, _, ratio) in compare(pairs).items() if name.startswith(way)]
                if len(ratios) > 1:
                    mean = statistics.geometric_mean(ratios)
                    print(f"{way}, geometric mean of {len(ratios)}: {mean:.2f}, goal: {goal}", flush=True)
        else:
            print("no comparison: it needs --other, --kernel and --modules")
        figures = alone(image, names)
        result["default_guest"] = {name: round(figure, 1) for name, figure in figures.items()}
        for name, figure in figures.items():
            print(f"default guest, {name}: {figure:.1f}", flush=True)
        if not options.only:
            with running(image) as guest:
                guest.dial(MANY_DIALS // 10)
                before = private_kib(guest.pid)
                guest.dial(MANY_DIALS)
                after = private_kib(guest.pid)
                print(f"memory: {before} KiB, after {MANY_DIALS} more connections {after} KiB", flush=True)
                result["memory_kib"] = [before, after]
        if options.integrity:
            with running(image) as guest:
                size = int(options.integrity * (1 << 30)) // 8 * 8
                for sends, way in ((True, "guest to host"), (False, "host to guest")):
                    speed = guest.stream(sends=sends, size=size, chunk=CHUNKS[1], streams=1, hashes=True)
                    print(f"integrity, {way}: {size >> 20} MiB, CRC-32 equal, {speed:.0f} MB/s", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
