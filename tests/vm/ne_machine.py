# SPDX-License-Identifier: Apache-2.0
"""A parent with the kernel's own nitro_enclaves driver, our device, and a hypervisor that only says what a test wants.

Eight CPUs, of which 2 to 7 are the pool: the siblings are 2 and 3, 4 and 5, 6 and 7. Huge pages of both sizes on NUMA
node 0; some of 2 MiB on node 1. A shell on its serial port does what it is told, a line at a time.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from enclavekit.eif import Arch, BytesContent
from enclavekit.environment import data_directory
from enclavekit.image.boot import boot_ramdisk
from enclavekit.image.modules import resolve
from enclavekit.image.ramdisk import Ramdisk
from enclavekit.image.tree import Node
from enclavekit.lab.ne_server import NeServer
from enclavekit.lab.ne_slots import Limits
from enclavekit.lab.slots import Answer, Slot
from enclavekit.linux.tsc import TscClock
from enclavekit.runtime import Runtime, find_qemu
from enclavekit.runtime.find import find_kernel

CPUS = 8
POOL = "2-7"
HUGE_PAGES = 160
TIMEOUT_S = 60.0
KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""Where the kernel has physical address 0 of itself, without KASLR."""
MAX_HZ = 1000
INIT = f"""#!/bin/busybox sh
export PATH=/bin
busybox mkdir -p /proc /sys /dev /run
busybox mount -t proc proc /proc; busybox mount -t sysfs sys /sys; busybox mount -t devtmpfs dev /dev
for module in /modules/*.ko; do busybox insmod $module; done
exec </dev/ttyS0 >/dev/ttyS0 2>&1
busybox stty raw -echo
pool() {{ echo "$1" >/sys/module/nitro_enclaves/parameters/ne_cpus; }}
steps() {{ NE_STEPS_HUGE=1 /steps "$@"; }}
pool {POOL}
echo ready
while read -r line; do eval "$line"; echo "status: $?"; done
"""
# Node 0 is where all CPUs are, so it is the pool's.
COMMAND = (
    "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-smp", f"{CPUS},sockets=1,cores=4,threads=2",
    "-m", "4224M", "-object", "memory-backend-memfd,id=m0,size=4096M,share=on",
    "-object", "memory-backend-memfd,id=m1,size=128M,share=on",
    "-numa", f"node,nodeid=0,memdev=m0,cpus=0-{CPUS - 1}", "-numa", "node,nodeid=1,memdev=m1",
    "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
)  # fmt: skip
APPEND = (
    f"console=ttyS0 nokaslr quiet loglevel=0 panic=-1 reboot=t tsc=reliable no_timer_check "
    f"hugepagesz=1G hugepages=0:1 hugepagesz=2M hugepages=0:{HUGE_PAGES},1:4"
)


def compiled(source: Path, directory: Path) -> Path:
    """A C program, static: for any machine."""
    target = directory / source.stem
    subprocess.run(
        [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-musl", "-Os", "-static", "-s", "-Wall",
         "-Wextra", "-Werror", "-o", target, source],
        check=True,
    )  # fmt: skip
    return target


class Script:
    """The hypervisor: ``rc``, ``end`` and ``silent`` say what becomes of starts; ``said`` is what it was asked."""

    def __init__(self) -> None:
        self.server: NeServer | None = None
        self.reset()

    def reset(self) -> None:
        """As before any row."""
        self.rc, self.end, self.next_cid = 0, False, 16
        self.silent = False
        self.asked = threading.Event()
        self.said: list[str] = []
        self.memory: list[tuple[int, int]] = []

    def start(self, slot: Slot, cid: int, flags: int, answer: Answer) -> None:
        del flags
        self.said.append("start")
        self.memory = [(one.address, one.size) for one in slot.memory]
        self.asked.set()
        if self.silent:
            return
        answer(self.rc, 0 if self.rc else cid or self.next_cid)
        self.next_cid += 1
        if self.end and self.server is not None:
            self.server.ended(slot.uid)

    def stop(self, slot: Slot) -> None:
        del slot
        self.said.append("stop")

    def free(self, slot: Slot) -> None:
        self.said.append("free")
        self.memory = [(one.address, one.size) for one in slot.memory]


class NeMachine:
    """``steps`` is the program of that name. Closed at the end of a ``with``."""

    def __init__(self, directory: Path, steps: Path) -> None:
        runtime = data_directory() / "runtime"
        qemu, kernel = find_qemu(runtime), find_kernel(runtime)
        modules = resolve(kernel.modules, arch=Arch.X86_64, release="", required=("nitro_enclaves",), optional=())
        busybox = Runtime(runtime).install_package("busybox-static") / "usr/bin/busybox"
        ramdisk = directory / "ramdisk"
        programs = Ramdisk(
            [
                (b"bin", Node(0o40755)),
                (b"bin/busybox", Node(0o100755, content=BytesContent(busybox.read_bytes()))),
                (b"steps", Node(0o100755, content=BytesContent(steps.read_bytes()))),
            ]
        )
        with ramdisk.open("wb") as file:
            for part in (boot_ramdisk(INIT.encode(), modules.modules), programs):
                for chunk in part.chunks():
                    file.write(chunk)
                file.write(bytes(-file.tell() % 4))
        listener = socket.socket(socket.AF_UNIX)
        path = directory / "device"
        listener.bind(str(path))
        listener.listen(1)
        self.hypervisor = Script()
        self.server = self.hypervisor.server = NeServer(listener, self.hypervisor, limits=Limits(cpus=CPUS))
        self.device = self.server.device
        self.server.start()
        clock = TscClock()
        khz = clock.khz()
        early = f" tsc_early_khz={khz}" if khz else ""
        self._process = subprocess.Popen(
            [*qemu.command, *COMMAND, "-kernel", kernel.path, "-initrd", ramdisk, "-append", APPEND + early,
             "-device", f'{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{path}"}},"addr":"02.0"}}'],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(qemu.environment),
        )  # fmt: skip
        self._said = b""
        self.console = b""
        try:
            self._until(b"ready\n")
            (line,) = self.do("busybox grep -w jiffies_64 /proc/kallsyms")
            self._ticks = int(line.split()[0], 16) - KERNEL_MAP
        except BaseException:
            self.close()
            raise

    def do(self, line: str) -> list[str]:
        """A line for the shell: what was printed, without its status, which has to be 0."""
        self._tell(line)
        return self._told()

    def steps(self, *words: str) -> list[int]:
        """What each step came to; the first is NE_CREATE_VM's."""
        self.ask(*words)
        return self.answers()

    def ask(self, *words: str) -> None:
        """Begin steps; ``answers`` waits for them."""
        self._tell(f"steps {' '.join(words)}")

    def answers(self, timeout_s: float = TIMEOUT_S) -> list[int]:
        """What they came to."""
        return [int(word) for word in self._told(timeout_s)[-1].split()]

    def skip_time(self) -> None:
        """For the kernel it is two minutes later, or more: its count of ticks is moved on, in its memory."""
        (ticks,) = self.server._memory.find(self._ticks, 8)
        count = int.from_bytes(os.pread(ticks.fd, 8, ticks.offset), "little") + 121 * MAX_HZ
        os.pwrite(ticks.fd, count.to_bytes(8, "little"), ticks.offset)

    def reset(self) -> None:
        """Device and hypervisor as they were at first."""
        self.hypervisor.reset()
        self.device.faults.clear()
        self.device.limits.regions, self.device.limits.slots = 1024, 4

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.server.close()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def _told(self, timeout_s: float = TIMEOUT_S) -> list[str]:
        *said, status = self._until(b"\n", after=b"status: ", timeout_s=timeout_s).decode().splitlines()
        assert status == "status: 0", (said, status)
        return said

    def _until(self, end: bytes, after: bytes = b"", timeout_s: float = TIMEOUT_S) -> bytes:
        """What is said up to ``end``, which follows ``after``."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while True:
            begin = self._said.rfind(after) if after else 0
            at = self._said.find(end, begin) if begin >= 0 else -1
            if at >= 0:
                said, self._said = self._said[: at + len(end)], self._said[at + len(end) :]
                return said
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError(self.console.decode(errors="replace"))
            data = os.read(self._process.stdout.fileno(), 4096)
            if not data:
                raise EOFError(self.console.decode(errors="replace"))
            self.console += data
            self._said += data.replace(b"\r\n", b"\n")
