# SPDX-License-Identifier: Apache-2.0
"""A machine with a true /dev/kvm on any host: QEMU's TCG with emulated SVM, Debian's kernel, Python and this package.

Its root file system is Debian's packages as mmdebstrap lays them out, with what the package needs from PyPI, compiled:
made once for each set of them, and kept in the user's cache. The package itself, kernel modules, and whatever a test
gives come in further ramdisks, so they are always those of the moment.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import enclavekit
from enclavekit.eif import Arch
from enclavekit.environment import cache_directory, data_directory
from enclavekit.image.boot import boot_ramdisk
from enclavekit.image.modules import resolve
from enclavekit.image.ramdisk import Ramdisk
from enclavekit.image.sources import open_directory
from enclavekit.runtime import find_qemu
from enclavekit.runtime.find import find_kernel

SOURCES = ("/etc/apt/sources.list", "/etc/apt/sources.list.d/debian.sources")
PACKAGES = ("python3-minimal", "libpython3-stdlib", "busybox-static")
PROGRAMS = ("mmdebstrap",)
REQUIREMENTS = ("click>=8.1", "rich>=13", "cbor2>=6.3", "cryptography>=42", "backports.zstd>=1")
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64")
LIBRARY = "usr/lib/python3/dist-packages"
LIBRARIES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
VERSION = 2
"""To be raised when the base is made otherwise."""

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


@dataclass(frozen=True, slots=True)
class Base:
    """The file system without this package, as a directory and as a ramdisk."""

    root: Path
    ramdisk: Path

    def compile(self, directory: Path) -> None:
        """Compile Python files by the Python in there: under TCG each would take its time, at each start."""
        loader = self.root / "lib64/ld-linux-x86-64.so.2"
        libraries = ":".join(str(self.root / name) for name in LIBRARIES)
        python = next(path for path in sorted((self.root / "usr/bin").glob("python3.*")) if path.is_file())
        _run(
            loader, "--library-path", libraries, python, "-S", "-m", "compileall", "-q", "--invalidation-mode",
            "unchecked-hash", "-x", "(lib2to3|test)/", directory, environment={"PYTHONHOME": str(self.root / "usr")},
        )  # fmt: skip


def base() -> Base:
    """Made once. CalledProcessError when one of the programs fails."""
    codename = _run("sh", "-c", '. /etc/os-release; echo "$VERSION_CODENAME"').strip()
    words = [str(VERSION), codename, *PACKAGES, *REQUIREMENTS]
    name = hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]
    cache = cache_directory() / "nested"
    made = Base(cache / f"base-{name}/root", cache / f"base-{name}/root.cpio")
    if made.ramdisk.exists():
        return made
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=cache) as directory:
        making = Base(Path(directory, "base/root"), Path(directory, "base/root.cpio"))
        making.root.mkdir(parents=True)
        tar = Path(directory, "base.tar")
        sources = [name for name in SOURCES if Path(name).is_file()]
        _run("mmdebstrap", "--quiet", "--variant=extract", f"--include={','.join(PACKAGES)}", codename, tar, *sources)
        with tarfile.open(tar) as opened:
            # Devices and owners are not wanted: it is a directory of the user's.
            members = [member for member in opened if not member.isdev()]
            opened.extractall(making.root, members, filter="tar")
        _add_requirements(making.root)
        making.compile(making.root / "usr/lib")
        with open_directory(making.root) as source:
            _write(making.ramdisk, [Ramdisk([(path, node) for path, node in source.tree.items() if path])])
        making.root.parent.rename(made.root.parent)
    return made


def _add_requirements(root: Path) -> None:
    version = next(
        match[1] for path in (root / "usr/bin").iterdir() if (match := re.fullmatch(r"python(3\.[0-9]+)", path.name))
    )
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    _run(
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
        "--only-binary=:all:", "--python-version", version, *platforms, "--target", root / LIBRARY, *REQUIREMENTS,
    )  # fmt: skip


def run_nested(script: str, files: Mapping[str, Path], *, timeout_s: float) -> Result:
    """Start a machine, run a shell script in it, see it power off. ``files`` are put at the root by their names."""
    runtime = data_directory() / "runtime"
    qemu, kernel = find_qemu(runtime), find_kernel(runtime)
    modules = resolve(kernel.modules, arch=Arch.X86_64, release="", required=MODULES, optional=()).modules
    system = base()
    with tempfile.TemporaryDirectory(prefix="enclavekit-nested-") as directory:
        work, ramdisk = Path(directory, "own"), Path(directory, "ramdisk")
        package = work / LIBRARY / "enclavekit"
        shutil.copytree(Path(enclavekit.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        system.compile(package)
        (work / "script").write_text(script)
        for name, path in files.items():
            shutil.copyfile(path, work / name)
        with open_directory(work) as own:
            nodes = [(path, node) for path, node in own.tree.items() if path]
            _write(ramdisk, [system.ramdisk, boot_ramdisk(INIT.encode(), modules), Ramdisk(nodes)])
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


def _write(target: Path, parts: Iterable[Path | Ramdisk]) -> None:
    """Archives one after the other, each starting at a multiple of four; renamed into place when whole."""
    beside = target.with_name(f".{target.name}")
    with beside.open("wb") as file:
        for part in parts:
            for chunk in [part.read_bytes()] if isinstance(part, Path) else part.chunks():
                file.write(chunk)
            file.write(bytes(-file.tell() % 4))
    beside.rename(target)


def _run(*words: str | Path, environment: Mapping[str, str] | None = None) -> str:
    return subprocess.run(
        words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
