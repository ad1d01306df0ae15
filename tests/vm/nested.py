# SPDX-License-Identifier: Apache-2.0
"""A machine with a true /dev/kvm on any host: QEMU's TCG with emulated SVM, Debian's kernel, Python and this package.

Its root file system is Debian's packages as mmdebstrap lays them out, with what the package needs from PyPI: made once
for each set of them, and kept as a ramdisk in the user's cache. The package itself, kernel modules, and whatever a test
gives come in further ramdisks, so they are always those of the moment.
"""

from __future__ import annotations

import hashlib
import re
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import enclavekit
from enclavekit.eif import Arch, BytesContent
from enclavekit.environment import cache_directory, data_directory
from enclavekit.image.boot import boot_ramdisk
from enclavekit.image.modules import resolve
from enclavekit.image.ramdisk import Ramdisk
from enclavekit.image.sources import open_tar
from enclavekit.image.tree import Node
from enclavekit.runtime import find_qemu
from enclavekit.runtime.find import find_kernel

SOURCES = ("/etc/apt/sources.list", "/etc/apt/sources.list.d/debian.sources")
PACKAGES = ("python3-minimal", "libpython3-stdlib", "busybox-static")
PROGRAMS = ("mmdebstrap",)
REQUIREMENTS = ("click>=8.1", "rich>=13", "cbor2>=6.3", "cryptography>=42")
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64")
LIBRARY = "usr/lib/python3/dist-packages"
VERSION = 1
"""To be raised when the base is made otherwise."""

MODULES = ("irqbypass", "kvm", "kvm_amd")
MEMORY_MIB = 2048
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


def base_ramdisk() -> Path:
    """The file system without this package. CalledProcessError when one of the programs fails."""
    codename = _run("sh", "-c", '. /etc/os-release; echo "$VERSION_CODENAME"').strip()
    words = [str(VERSION), codename, *PACKAGES, *REQUIREMENTS]
    name = hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]
    made = cache_directory() / "nested" / f"base-{name}.cpio"
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="enclavekit-nested-") as directory:
        work = Path(directory)
        tar = work / "base.tar"
        sources = [name for name in SOURCES if Path(name).is_file()]
        _run("mmdebstrap", "--quiet", "--variant=extract", f"--include={','.join(PACKAGES)}", codename, tar, *sources)
        _add_requirements(tar, work / "packages")
        with open_tar(tar) as source:
            _write(made, [Ramdisk([(path, node) for path, node in source.tree.items() if path])])
    return made


def _add_requirements(tar: Path, packages: Path) -> None:
    with tarfile.open(tar) as opened:
        version = next(
            match[1] for name in opened.getnames() if (match := re.search(r"usr/bin/python(3\.[0-9]+)$", name))
        )
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    _run(
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
        "--only-binary=:all:", "--python-version", version, *platforms, "--target", packages, *REQUIREMENTS,
    )  # fmt: skip
    with tarfile.open(tar, "a") as opened:
        opened.add(packages, f"./{LIBRARY}")


def run_nested(script: str, files: Mapping[str, Path], *, timeout_s: float) -> Result:
    """Start a machine, run a shell script in it, see it power off. ``files`` are put at the root by their names."""
    runtime = data_directory() / "runtime"
    qemu, kernel = find_qemu(runtime), find_kernel(runtime)
    modules = resolve(kernel.modules, arch=Arch.X86_64, release="", required=MODULES, optional=()).modules
    with tempfile.TemporaryDirectory(prefix="enclavekit-nested-") as directory:
        ramdisk = Path(directory) / "ramdisk"
        _write(
            ramdisk,
            [base_ramdisk(), boot_ramdisk(INIT.encode(), modules), Ramdisk(list(_own_nodes(script, files)))],
        )
        command: list[str | Path] = [
            *qemu.command, "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,+svm", "-smp", str(CPUS),
            "-m", f"{MEMORY_MIB}M", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-serial", "stdio", "-kernel", kernel.path, "-initrd", ramdisk,
            "-append", "console=ttyS0 quiet panic=-1 tsc=reliable",
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


def _own_nodes(script: str, files: Mapping[str, Path]) -> Iterable[tuple[bytes, Node]]:
    yield b"script", Node(stat.S_IFREG | 0o644, content=BytesContent(script.encode()))
    for name, path in files.items():
        yield name.encode(), Node(stat.S_IFREG | 0o644, content=BytesContent(path.read_bytes()))
    package = Path(enclavekit.__file__).parent
    yield f"{LIBRARY}/enclavekit".encode(), Node(stat.S_IFDIR | 0o755)
    for path in sorted(package.rglob("*")):
        inside = f"{LIBRARY}/enclavekit/{path.relative_to(package)}".encode()
        if path.is_dir():
            yield inside, Node(stat.S_IFDIR | 0o755)
        elif path.suffix != ".pyc":
            yield inside, Node(stat.S_IFREG | 0o644, content=BytesContent(path.read_bytes()))


def _write(target: Path, parts: Iterable[Path | Ramdisk]) -> None:
    """Archives one after the other, each starting at a multiple of four; renamed into place when whole."""
    beside = target.with_name(f".{target.name}")
    with beside.open("wb") as file:
        for part in parts:
            for chunk in [part.read_bytes()] if isinstance(part, Path) else part.chunks():
                file.write(chunk)
            file.write(bytes(-file.tell() % 4))
    beside.rename(target)


def _run(*words: str | Path) -> str:
    return subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout
