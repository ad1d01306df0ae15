# SPDX-License-Identifier: Apache-2.0
"""A machine with a true /dev/kvm on any host: QEMU's TCG with emulated SVM, Debian's kernel, Python and this package.

Its root file system is that of a lab's parent (``enclavekit.lab.root``); kernel modules, and whatever a test gives,
come in further ramdisks.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from enclavekit.eif import Arch
from enclavekit.environment import data_directory, lab_cache
from enclavekit.image.boot import boot_ramdisk
from enclavekit.image.modules import resolve
from enclavekit.image.ramdisk import Ramdisk
from enclavekit.image.sources import open_directory
from enclavekit.lab.root import join, make_system, package_ramdisk
from enclavekit.runtime import Runtime, find_qemu
from enclavekit.runtime.distribution import PARENT
from enclavekit.runtime.find import find_kernel

MODULES = ("irqbypass", "kvm", "kvm_amd")
MEMORY_MIB = 7168
"""Taken as it is used; an enclave of 5 GiB is to fit."""
CPUS = 2

INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev /run /tmp
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
for module in /modules/*.ko; do $b insmod $module; done
export PATH=/usr/bin:/bin HOME=/run XDG_RUNTIME_DIR=/run LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
$b sh /script; echo "nested: exit status $?"
$b poweroff -f
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What the script said on the console, and its exit status; None when it came to none."""

    console: str
    status: int | None


def root_ramdisks() -> list[Path]:
    """Those of a lab's parent; fetched and made the first time."""
    (packages,) = Runtime(data_directory() / "runtime").install(want=[PARENT])
    system = make_system(packages.path, lab_cache())
    return [system.ramdisk, package_ramdisk(system, lab_cache())]


def run_nested(script: str, files: Mapping[str, Path], *, timeout_s: float) -> Result:
    """Start a machine, run a shell script in it, see it power off. ``files`` are put at the root by their names."""
    runtime = data_directory() / "runtime"
    qemu, kernel = find_qemu(runtime), find_kernel(runtime)
    modules = resolve(kernel.modules, arch=Arch.X86_64, release="", required=MODULES, optional=()).modules
    with tempfile.TemporaryDirectory(prefix="enclavekit-nested-") as directory:
        work, ramdisk = Path(directory, "own"), Path(directory, "ramdisk")
        work.mkdir()
        (work / "script").write_text(script)
        for name, path in files.items():
            shutil.copyfile(path, work / name)
        with open_directory(work) as own:
            nodes = [(path, node) for path, node in own.tree.items() if path]
            with ramdisk.open("wb") as out:
                join([*root_ramdisks(), boot_ramdisk(INIT.encode(), modules), Ramdisk(nodes)], out.fileno())
        command: list[str | Path] = [
            *qemu.command, "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,+svm", "-smp", str(CPUS),
            "-m", f"{MEMORY_MIB}M", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-serial", "stdio", "-kernel", kernel.path, "-initrd", ramdisk,
            "-append", "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s,
                env=dict(qemu.environment), check=False,
            )  # fmt: skip
            said = done.stdout
        except subprocess.TimeoutExpired as expired:
            said = expired.stdout or b""
    console = said.decode(errors="replace").replace("\r\n", "\n")
    status = re.search(r"^nested: exit status ([0-9]+)$", console, re.MULTILINE)
    return Result(console, int(status[1]) if status else None)
