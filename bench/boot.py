# SPDX-License-Identifier: Apache-2.0
"""How long a boot takes: our loader against QEMU's own -kernel, and what ``enclave run`` adds to the bare QEMU process.

With ``--small NAME``, a kernel of ``enclave kernel build``, also that one through our loader: the goal is at most 0.55
of the time of the runtime's.

Same kernel, ramdisk, devices and accelerator, interleaved in one run, medians. The ramdisk's /init is 130 bytes that
print one line and end the machine; the time is from the start of QEMU to that line. No ACPI in either: QEMU's -kernel
(with qboot) and our ROM both give an MP table.

    python bench/boot.py [--rounds N] [--small NAME]
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from struct import pack

from enclavekit import eif
from enclavekit.eif import Arch, BytesContent, FileContent, Section, SectionType
from enclavekit.eif.layout import HEADER_SIZE, SECTION_HEADER_SIZE
from enclavekit.environment import data_directory, qemu_environment
from enclavekit.hypervisor.accel import Accel
from enclavekit.hypervisor.contract import MemoryRegion
from enclavekit.hypervisor.launch import write_image
from enclavekit.image.boot import boot_ramdisk
from enclavekit.platform import rom
from enclavekit.platform.machine import IMAGE_LOAD_OFFSET, MIB
from enclavekit.runtime import Kernel, Qemu, Runtime, find_kernel, find_qemu
from enclavekit.runtime.kernels import Kernels

MEMORY = 256 * MIB
CMDLINE = "reboot=k panic=1 pci=off console=ttyS0 quiet i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd"
LINE = b"init\n"
TIMEOUT_S = 120
MACHINE = "microvm,acpi=off,rtc=off,isa-serial=on,memory-backend=mem"


def init_program() -> bytes:
    """A static ELF program: write(1, "init\\n"), then reboot(2)."""
    code = (
        bytes.fromhex("b801000000 bf01000000 488d3522000000 ba05000000 0f05")
        + bytes.fromhex("b8a9000000 bfaddee1fe be69191228 ba67452301 4531d2 0f05 ebfe")
        + LINE
    )
    base, offset = 0x400000, 64 + 56
    size = offset + len(code)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, base + offset, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    return header + pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000) + code


def until_line(command: list[str], environment: dict[str, str], fds: list[int]) -> float:
    """Seconds from the start of QEMU to init's line on its standard output."""
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, pass_fds=fds
    ) as process:
        assert process.stdout is not None
        seen = b""
        while LINE.strip() not in seen.split():
            ready, _, _ = select.select([process.stdout], [], [], TIMEOUT_S)
            data = os.read(process.stdout.fileno(), 4096) if ready else b""
            if not data:
                process.kill()
                raise SystemExit(f"no line from init: {seen[-500:]!r}")
            seen += data
        passed = time.perf_counter() - start
        process.wait(TIMEOUT_S)
        return passed


def common(qemu: Qemu, memory_fd: int, memory: int = MEMORY) -> list[str]:
    return [
        *qemu.command, "-machine", MACHINE, "-accel", "tcg", "-cpu", Accel.TCG.cpu_model,
        "-smp", "1", "-m", f"{memory // MIB}M",
        "-object", f"memory-backend-file,id=mem,size={memory},mem-path=/proc/self/fd/{memory_fd},share=on",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-device", "i8042",
    ]  # fmt: skip


def with_loader(qemu: Qemu, image: bytes) -> float:
    """Our ROM; the image is written before QEMU starts, and that is counted."""
    start = time.perf_counter()
    memory_fd, rom_fd = os.memfd_create("memory"), os.memfd_create("rom")
    os.ftruncate(memory_fd, MEMORY)
    with mmap.mmap(memory_fd, MEMORY) as mapped:
        region = MemoryRegion(0, memoryview(mapped))
        write_image(io.BytesIO(image), len(image), [region], IMAGE_LOAD_OFFSET)
        region.buffer.release()
    boot = rom.Boot(MEMORY, 1, IMAGE_LOAD_OFFSET, len(image), (), eif.Discovery.CMDLINE)
    os.write(rom_fd, rom.compose(boot, rom.loader()))
    command = [*common(qemu, memory_fd), "-bios", f"/proc/self/fd/{rom_fd}"]
    before = time.perf_counter() - start
    try:
        return before + until_line(command, qemu_variables(qemu), [memory_fd, rom_fd])
    finally:
        os.close(memory_fd)
        os.close(rom_fd)


def with_kernel_option(qemu: Qemu, kernel: Path, ramdisk: Path) -> float:
    """QEMU's own way: qboot fetches kernel and ramdisk over fw_cfg."""
    memory_fd = os.memfd_create("memory")
    os.ftruncate(memory_fd, MEMORY)
    command = [*common(qemu, memory_fd), "-kernel", str(kernel), "-initrd", str(ramdisk), "-append", CMDLINE]
    try:
        return until_line(command, qemu_variables(qemu), [memory_fd])
    finally:
        os.close(memory_fd)


def qemu_variables(qemu: Qemu) -> dict[str, str]:
    return {**qemu_environment(), **qemu.environment}


def run_overhead(image: Path, directory: Path) -> tuple[float, float]:
    """(seconds of ``enclave run`` before QEMU starts and after it ends, seconds of QEMU itself)."""
    start = time.perf_counter()
    command: list[str | Path] = [Path(sys.executable).with_name("enclave"), "run", "--accel", "tcg", "-q", image]
    # As for most users, Python may keep what it compiled.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen(command, env={**environment, "XDG_RUNTIME_DIR": str(directory)}) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pid = 0
        while not pid:
            assert process.poll() is None, "enclave run ended before QEMU was seen"
            for child in map(int, children.read_text().split()):
                if b"qemu-system" in Path(f"/proc/{child}/cmdline").read_bytes():
                    pid = child
            time.sleep(0.001)
        began = time.perf_counter()
        fd = os.pidfd_open(pid)
        select.select([fd], [], [], TIMEOUT_S)
        ended = time.perf_counter()
        os.close(fd)
        status = process.wait(TIMEOUT_S)
        assert status == 42, status
    return began - start + time.perf_counter() - ended, ended - began


def hello_image(directory: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples/hello"))
    from make_rootfs import make_rootfs  # type: ignore[import-not-found]

    make_rootfs(directory / "rootfs", Runtime(data_directory() / "runtime").install_package("busybox-static"))
    enclave = Path(sys.executable).with_name("enclave")
    image = directory / "hello.eif"
    subprocess.run(
        [enclave, "build", "-q", f"dir:{directory}/rootfs", "-o", image, "--", "sh", "-c", "exit 42"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return image


def make_image(kernel: Kernel) -> tuple[bytes, bytes]:
    """The EIF, and its ramdisk by itself."""
    ramdisk = boot_ramdisk(init_program(), [])
    alone = b"".join(bytes(chunk) for chunk in ramdisk.chunks())
    out = io.BytesIO()
    with kernel.path.open("rb") as file:
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
    return out.getvalue(), alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", metavar="NAME")
    words = parser.parse_args()
    rounds = words.rounds
    root = data_directory() / "runtime"
    qemu, kernel = find_qemu(root), find_kernel(root)
    image, ramdisk = make_image(kernel)
    known = Kernels(data_directory() / "kernels", root)
    ours = known.choose(words.small, None) if words.small else None
    small = make_image(ours)[0] if ours else b""
    loader, option, added, bare, ours_s = [], [], [], [], []
    with tempfile.TemporaryDirectory() as directory:
        ramdisk_file = Path(directory) / "ramdisk"
        ramdisk_file.write_bytes(ramdisk)
        hello = hello_image(Path(directory))
        for number in range(rounds):
            loader.append(with_loader(qemu, image))
            if small:
                ours_s.append(with_loader(qemu, small))
            option.append(with_kernel_option(qemu, kernel.path, ramdisk_file))
            around, inside = run_overhead(hello, Path(directory))
            added.append(around)
            bare.append(inside)
            print(f"round {number}: loader {loader[-1]:.2f} s, -kernel {option[-1]:.2f} s, run adds {added[-1]:.2f} s")
    result = {
        "kernel": kernel.name,
        "rounds": rounds,
        "loader_s": round(statistics.median(loader), 3),
        "qemu_kernel_s": round(statistics.median(option), 3),
        "ratio": round(statistics.median(loader) / statistics.median(option), 3),
        "run_adds_s": round(statistics.median(added), 3),
        "qemu_process_s": round(statistics.median(bare), 3),
    }
    if ours:
        result["small_kernel"] = ours.name
        result["small_kernel_size"] = ours.path.stat().st_size
        result["small_kernel_s"] = round(statistics.median(ours_s), 3)
        result["small_kernel_ratio"] = round(statistics.median(ours_s) / statistics.median(loader), 3)
        print(f"to init's first line, our kernel / the runtime's: {result['small_kernel_ratio']} (goal: at most 0.55)")
    print(f"to init's first line, loader / -kernel: {result['ratio']} (goal: at most 1.05)")
    print(f"enclave run adds to its QEMU process: {result['run_adds_s']} s (goal: at most 0.3)")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
