# SPDX-License-Identifier: Apache-2.0
"""Does it matter where an enclave is loaded? Every boot protocol, from an EIF and from parts, against QEMU's -kernel.

Same kernel, ramdisk, command line and accelerator, interleaved in one run; medians, as ratios to -kernel. Times are
from before anything is written into enclave memory to: the loader's last byte (0x4b on port 0xe9), the kernel's first
line, and init's. QEMU's -kernel has no marker. Then, from QEMU's start to the loader's end: ramdisks of two sizes.

    python bench/boot_protocols.py [--rounds N] [--svg FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import os
import select
import socket
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from boot import CMDLINE, MEMORY, TIMEOUT_S, common, make_image, qemu_variables
from enclavekit import eif
from enclavekit.codec.bzimage import READ_SIZE, BzImage
from enclavekit.eif import Content, FileContent
from enclavekit.environment import data_directory
from enclavekit.hypervisor.contract import MemoryRegion
from enclavekit.hypervisor.host_laid import lay_image
from enclavekit.hypervisor.launch import write_image
from enclavekit.hypervisor.parts import Parts, assemble
from enclavekit.platform import rom
from enclavekit.platform.guest_memory import GuestMemory
from enclavekit.platform.machine import IMAGE_LOAD_OFFSET, MIB, BootProtocol
from enclavekit.runtime import Qemu, find_kernel, find_qemu

MARKS = ("loader", "kernel", "init")
KERNEL_LINE, INIT_LINE = b"[    0.000000]", b"init\n"
EARLY = " earlyprintk=ttyS0 ignore_loglevel"


RAMDISKS = (8 * MIB, 1024 * MIB)


def until_marks(command: list[str], qemu: Qemu, fds: list[int], start: float, last: str = "init") -> dict[str, float]:
    """Seconds from ``start`` to each of MARKS up to the last."""
    ours, theirs = socket.socketpair()
    options = [
        "-chardev",
        f"socket,id=marker,fd={theirs.fileno()}",
        "-device",
        "isa-debugcon,iobase=0xe9,chardev=marker",
    ]
    seen, made = b"", {}
    with ours, subprocess.Popen(
        [*command, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=qemu_variables(qemu),
        pass_fds=[*fds, theirs.fileno()],
    ) as process:  # fmt: skip
        theirs.close()
        assert process.stdout is not None
        waited: list[Any] = [process.stdout, ours]
        while last not in made:
            ready, _, _ = select.select(waited, [], [], TIMEOUT_S)
            now = time.perf_counter() - start
            if not ready:
                process.kill()
                raise SystemExit(f"no line from init: {seen[-500:]!r}")
            if ours in ready:
                if b"\x4b" in ours.recv(64):
                    made["loader"] = now
                waited.remove(ours)
            if process.stdout in ready:
                data = os.read(process.stdout.fileno(), 4096)
                if not data:
                    raise SystemExit(f"no line from init: {seen[-500:]!r}")
                seen += data.replace(b"\r", b"")
                if KERNEL_LINE in seen:
                    made.setdefault("kernel", now)
                if b"\n" + INIT_LINE in seen:
                    made["init"] = now
        if last != "init":
            process.kill()
        process.wait(TIMEOUT_S)
    return made


def with_rom(qemu: Qemu, protocol: BootProtocol, image: bytes | Parts) -> dict[str, float]:
    """Our ROM: an EIF, or parts, written before QEMU starts, and that is counted."""
    start = time.perf_counter()
    size = image.size if isinstance(image, Parts) else len(image)
    memory_fd, rom_fd = os.memfd_create("memory"), os.memfd_create("rom")
    os.ftruncate(memory_fd, MEMORY)
    boot = rom.Boot(MEMORY, 1, IMAGE_LOAD_OFFSET, size, (), eif.Discovery.CMDLINE, EARLY.split())
    with mmap.mmap(memory_fd, MEMORY) as mapped, memoryview(mapped) as view:
        regions = [MemoryRegion(0, view)]

        def write(address: int) -> None:
            if isinstance(image, Parts):
                assemble(image, regions, address)
            else:
                write_image(io.BytesIO(image), size, regions, address)

        if protocol is BootProtocol.EIF:
            write(IMAGE_LOAD_OFFSET)
        else:
            if isinstance(image, Parts):
                setup, kernel_size = next(image.kernel.chunks())[:READ_SIZE], image.kernel.size
            else:
                section = eif.read(io.BytesIO(image)).kernel
                setup, kernel_size = image[section.offset :][:READ_SIZE], section.size
            boot = lay_image(boot, protocol, GuestMemory(regions, MEMORY), BzImage.parse(setup, kernel_size), write)
    os.write(rom_fd, rom.compose(boot, rom.loader()))
    command = [*common(qemu, memory_fd), "-bios", f"/proc/self/fd/{rom_fd}"]
    try:
        return until_marks(command, qemu, [memory_fd, rom_fd], start)
    finally:
        os.close(memory_fd)
        os.close(rom_fd)


def loader_s(qemu: Qemu, kernel: Content, ramdisk: int) -> float:
    """Seconds from QEMU's start to the loader's end, with a ramdisk of this many bytes in place."""
    memory = ramdisk + 512 * MIB
    memory_fd, rom_fd = os.memfd_create("memory"), os.memfd_create("rom")
    os.ftruncate(memory_fd, memory)
    try:
        with tempfile.TemporaryFile() as file, mmap.mmap(memory_fd, memory) as mapped, memoryview(mapped) as view:
            file.truncate(ramdisk)
            parts = Parts(kernel, CMDLINE.encode(), [FileContent(file, 0, ramdisk, "ramdisk")])
            assemble(parts, [MemoryRegion(0, view)], IMAGE_LOAD_OFFSET)
        boot = rom.Boot(memory, 1, IMAGE_LOAD_OFFSET, parts.size, (), eif.Discovery.CMDLINE)
        os.write(rom_fd, rom.compose(boot, rom.loader()))
        command = [*common(qemu, memory_fd, memory), "-bios", f"/proc/self/fd/{rom_fd}"]
        return until_marks(command, qemu, [memory_fd, rom_fd], time.perf_counter(), "loader")["loader"]
    finally:
        os.close(memory_fd)
        os.close(rom_fd)


def with_kernel_option(qemu: Qemu, kernel: Path, ramdisk: Path) -> dict[str, float]:
    """QEMU's own way."""
    start = time.perf_counter()
    memory_fd = os.memfd_create("memory")
    os.ftruncate(memory_fd, MEMORY)
    words = ["-kernel", str(kernel), "-initrd", str(ramdisk), "-append", CMDLINE + EARLY]
    try:
        return until_marks([*common(qemu, memory_fd), *words], qemu, [memory_fd], start)
    finally:
        os.close(memory_fd)


def plot(medians: dict[str, dict[str, float]]) -> str:
    """Horizontal bars, one for each variant: the marks, in seconds."""
    longest = max(marks["init"] for marks in medians.values())
    colours = {"init": "#9ecae1", "kernel": "#4292c6", "loader": "#08306b"}
    rows = []
    for number, (name, marks) in enumerate(medians.items()):
        y = 30 + 26 * number
        rows.append(f'<text x="150" y="{y + 14}" text-anchor="end">{name}</text>')
        for mark, colour in colours.items():
            if mark in marks:
                width = 480 * marks[mark] / longest
                rows.append(f'<rect x="160" y="{y}" width="{width:.1f}" height="18" fill="{colour}"/>')
        rows.append(f'<text x="{168 + 480 * marks["init"] / longest:.0f}" y="{y + 14}">{marks["init"]:.2f} s</text>')
    legend = "dark: the loader has ended; then: the kernel's first line; light: init's line"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{40 + 26 * len(medians)}" '
        f'font-family="sans-serif" font-size="13"><text x="160" y="18">{legend}</text>{"".join(rows)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    root = data_directory() / "runtime"
    qemu, kernel = find_qemu(root), find_kernel(root)
    image, ramdisk = make_image(kernel)
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    loaders: dict[int, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        ramdisk_file, image_file = Path(directory) / "ramdisk", Path(directory) / "image"
        ramdisk_file.write_bytes(ramdisk)
        image_file.write_bytes(image)
        with image_file.open("rb") as file:
            parts = Parts.of_image(file, eif.read(file), "image")
            for _ in range(options.rounds):
                made = {"-kernel": with_kernel_option(qemu, kernel.path, ramdisk_file)}
                for protocol in BootProtocol:
                    made[f"{protocol}, EIF"] = with_rom(qemu, protocol, image)
                    made[f"{protocol}, parts"] = with_rom(qemu, protocol, parts)
                for name, marks in made.items():
                    for mark, passed in marks.items():
                        times[name][mark].append(passed)
                for size in RAMDISKS:
                    loaders[size].append(loader_s(qemu, parts.kernel, size))
    medians = {
        name: {mark: statistics.median(marks[mark]) for mark in MARKS if mark in marks} for name, marks in times.items()
    }
    base = medians["-kernel"]
    for name, marks in medians.items():
        ratios = {mark: passed / base[mark] for mark, passed in marks.items() if mark in base}
        words = ", ".join(f"{mark} {passed:.2f} s" for mark, passed in marks.items())
        print(f"{name:16} {words}; to -kernel: " + ", ".join(f"{mark} {ratio:.2f}" for mark, ratio in ratios.items()))
    small, large = (statistics.median(loaders[size]) for size in RAMDISKS)
    print(f"loader, ramdisk of 8 MiB {small:.3f} s, of 1 GiB {large:.3f} s: {large / small:.2f}")
    result = {"rounds": options.rounds, "seconds": medians, "loader_8_mib_s": small, "loader_1_gib_s": large}
    print(json.dumps({"bench": "boot_protocols", **result}))
    if options.svg:
        options.svg.write_text(plot(medians))


if __name__ == "__main__":
    main()
