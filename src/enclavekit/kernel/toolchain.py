# SPDX-License-Identifier: Apache-2.0
"""A compiler that is unpacked somewhere, made to run there: no root, no container, whatever libc the host has.

Every program of the packages is run by the packages' own dynamic loader with their own libraries. The compiler starts
its parts (cc1, as, collect2, ld) by name from the first directory that has them, so each of those is a script of ours:

    DIRECTORY/bin/            gcc, ld, make, flex, …: what stands first in PATH
    DIRECTORY/host/           the parts of the compiler for this machine
    DIRECTORY/target/         the parts of the cross compiler, where there is one

Programs that the build makes for itself are linked to that loader too. Source: gcc(1) -B, ld.so(8).
"""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from enclavekit.errors import KernelBuildError, MissingError

HOST = "x86_64-linux-gnu"
LIBRARIES = f"usr/lib/{HOST}"
LOADER = f"{LIBRARIES}/ld-linux-x86-64.so.2"
PARTS = ("as", "ld", "ld.bfd", "nm", "ar", "objcopy", "objdump", "readelf", "strip", "ranlib")
"""Of binutils."""
TOOLS = ("make", "flex", "bison", "m4", "bc", "zstd", "xz")
"""What else a kernel is built with."""
NEEDED = ("sh", "awk", "cat", "cmp", "cut", "find", "grep", "gzip", "ln", "mkdir", "mv", "rm", "sed", "sort", "tr")
"""What is taken from this machine: every distribution has it, and its version changes nothing."""
COMPILER = re.compile(r"gcc-[0-9]{1,3}")


@dataclass(frozen=True, slots=True)
class Toolchain:
    """``directory`` holds the scripts, ``tree`` the unpacked packages."""

    directory: Path
    tree: Path

    @property
    def environment(self) -> dict[str, str]:
        """All that a build is given: nothing of the caller's own."""
        return {
            "PATH": f"{self.directory / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.directory),
            "LC_ALL": "C",
            "TZ": "UTC",
            "M4": str(self.directory / "bin/m4"),
            "BISON_PKGDATADIR": str(self.tree / "usr/share/bison"),
        }

    def version(self, prefix: str = "") -> str:
        """What the compiler calls itself."""
        done = subprocess.run(
            [self.directory / f"bin/{prefix}gcc", "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=self.environment,
            check=False,
        )
        if done.returncode != 0 or not done.stdout:
            said = " ".join(done.stderr.split())[:200]
            raise KernelBuildError(f"compiler: {prefix}gcc --version fails: {said}")
        return done.stdout.splitlines()[0]


def make_toolchain(directory: Path, tree: Path, target: str = HOST) -> Toolchain:
    """Write the scripts into ``directory``, new; ``target`` other than ``HOST`` adds a cross compiler.

    Errors: MissingError for what this machine lacks, KernelBuildError for a tree that lacks a program, OSError.
    """
    missing = [name for name in NEEDED if not any(Path(at, name).exists() for at in ("/usr/bin", "/bin"))]
    if missing:
        raise MissingError(f"a kernel cannot be built without: {', '.join(missing)}", hint="install them")
    tree = tree.absolute()
    scripts = _Scripts(directory.absolute(), tree)
    scripts.compiler(HOST, "host", "")
    if target != HOST:
        scripts.compiler(target, "target", f"{target}-")
    for name in TOOLS:
        scripts.add("bin", name, tree / "usr/bin" / name)
    return Toolchain(scripts.directory, tree)


class _Scripts:
    def __init__(self, directory: Path, tree: Path) -> None:
        self.directory = directory
        self._tree = tree

    def add(self, where: str, name: str, program: Path, *words: str) -> None:
        """A script that runs ``program`` with ``words`` before its own."""
        if not program.is_file():
            raise KernelBuildError(
                f"compiler: no {program.relative_to(self._tree)} in the packages",
                hint="enclave runtime remove, then enclave kernel build",
            )
        loader, libraries = self._tree / LOADER, self._tree / LIBRARIES
        path = self.directory / where / name
        command = [str(loader), "--inhibit-cache", "--library-path", str(libraries)]
        if name == "make":  # which starts itself again, by the name that it was started with
            command += ["--argv0", str(path)]
        command += [str(program), *words]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        path.chmod(0o755)

    def compiler(self, triplet: str, parts: str, prefix: str) -> None:
        """gcc and binutils for ``triplet``; what they link for this machine runs with the packages' libraries."""
        programs = self._tree / "usr/bin"
        found = sorted(path for path in programs.glob(f"{triplet}-gcc-*") if COMPILER.search(path.name))
        gcc = next((path for path in found if COMPILER.fullmatch(path.name.removeprefix(f"{triplet}-"))), None)
        if gcc is None:
            raise KernelBuildError(
                f"compiler: no gcc for {triplet} in the packages",
                hint="enclave runtime remove, then enclave kernel build",
            )
        version = gcc.name.rpartition("-")[2]
        libexec = self._tree / ("usr/libexec/gcc" if triplet == HOST else "usr/libexec/gcc-cross") / triplet / version
        if not libexec.is_dir() and triplet != HOST:
            libexec = self._tree / "usr/lib/gcc-cross" / triplet / version
        for name in ("cc1", "collect2"):
            self.add(parts, name, libexec / name)
        for name in PARTS:
            program = programs / f"{triplet}-{name}"
            self.add(parts, name, program)
            self.add("bin", f"{prefix}{name}", program)
        words = [f"-B{self.directory / parts}/", "-no-pie", "-fno-pie"]
        if triplet == HOST:
            libraries = self._tree / LIBRARIES
            words = [
                f"-B{self.directory / parts}/",
                f"--sysroot={self._tree}",
                f"-Wl,--dynamic-linker={self._tree / LOADER},-rpath,{libraries}",
            ]
        self.add("bin", f"{prefix}gcc", gcc, *words)
