# SPDX-License-Identifier: Apache-2.0
"""Build hook: compiles guest/ with the C compiler of the ziglang wheel, into the package.

The compiler is a pinned build dependency, so the same bytes come out on every machine; no host toolchain is used.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
GUEST = ROOT / "guest"
PACKAGE = ROOT / "src" / "enclavekit"

INIT_TARGETS = {"x86_64": "x86_64-linux-musl", "aarch64": "aarch64-linux-musl"}
INIT_FLAGS = ["-std=c11", "-Os", "-static", "-s", "-Wall", "-Wextra", "-Werror", "-fno-ident", "-Wl,--build-id=none"]
LOADER_FLAGS = [
    "-target", "x86-freestanding-none", "-mcpu=i386", "-std=c11", "-Os", "-ffreestanding", "-fno-pic", "-fno-ident",
    "-fno-stack-protector", "-fno-builtin", "-fno-sanitize=all", "-mno-sse", "-mno-mmx", "-mno-80387",
    "-Wall", "-Wextra", "-Werror", "-Wframe-larger-than=640", "-g0",
]  # fmt: skip


def zig(*arguments: str | Path, cache: Path) -> None:
    """Run the compiler with a cache of its own and paths that leave no trace in the output."""
    environment = dict(os.environ, ZIG_GLOBAL_CACHE_DIR=str(cache), ZIG_LOCAL_CACHE_DIR=str(cache))
    command = [sys.executable, "-m", "ziglang", *map(str, arguments)]
    done = subprocess.run(command, cwd=GUEST, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"cannot build guest code: {' '.join(command)}\n{done.stdout}{done.stderr}")


def replace(made: Path, target: Path) -> None:
    """Move a finished file into place; a build that fails leaves the old one."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.write_bytes(made.read_bytes())
    beside.replace(target)


def build_init(cache: Path) -> None:
    """guest/init → src/enclavekit/image/init.<arch>: static ELF programs."""
    sources = sorted(path.relative_to(GUEST) for path in (GUEST / "init").glob("*.c"))
    for arch, target in INIT_TARGETS.items():
        made = cache / f"init.{arch}"
        zig("cc", "-target", target, *INIT_FLAGS, "-o", made, *sources, cache=cache)
        replace(made, PACKAGE / "image" / f"init.{arch}")


def build_loader(cache: Path) -> None:
    """guest/loader → src/enclavekit/platform/loader.bin: a flat 32-bit binary, linked at its place in the ROM."""
    objects = []
    for source in sorted((GUEST / "loader").glob("*.[cS]")):
        made = cache / f"{source.name}.o"
        zig("cc", *LOADER_FLAGS, "-c", "-o", made, source.relative_to(GUEST), cache=cache)
        objects.append(made)
    elf, flat = cache / "loader.elf", cache / "loader.bin"
    script = GUEST / "loader" / "loader.ld"
    zig("ld.lld", "-m", "elf_i386", "--build-id=none", "-T", script, "-o", elf, *objects, cache=cache)
    zig("objcopy", "-O", "binary", elf, flat, cache=cache)
    replace(flat, PACKAGE / "platform" / "loader.bin")


def build_guest() -> None:
    """Everything that runs inside the enclave."""
    with tempfile.TemporaryDirectory(prefix="enclavekit-guest-") as directory:
        cache = Path(directory)
        build_init(cache)
        build_loader(cache)


class GuestBuildHook(BuildHookInterface):  # type: ignore[misc]  # hatchling has no types
    """Runs for wheels and editable installs alike; a wheel for any Linux Python, for the guest code is data."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name == "wheel":
            build_guest()


if __name__ == "__main__":
    build_guest()
