# SPDX-License-Identifier: Apache-2.0
"""How lint's tests break an image: one change of a clean recipe, and what is then said of it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from eif_images import METADATA
from elf_files import elf_file
from kernel_files import bzimage, kernel_proper
from lint_images import CMDLINE, CONFIG, DIRECTORY, FILE, PROGRAM, Recipe

from enclavekit.image.kernel_features import Feature
from enclavekit.inspection.findings import Level

Change = Callable[[Recipe], object]


@dataclass(frozen=True)
class Case:
    """An image that breaks one rule, and what is said of it."""

    code: str
    where: str
    message: str
    change: Change
    nitro: bool = False
    """In nitro-cli's layout."""
    memory: int | None = 1 << 30
    carrier: str | None = None
    level: Level | None = None
    """Other than the rule's."""


def sets(**parts: Any) -> Change:
    """Replace parts of the recipe."""

    def change(recipe: Recipe) -> None:
        for name, value in parts.items():
            setattr(recipe, name, value)

    return change


def boots(**files: Any) -> Change:
    """Add files to the boot ramdisk, or take away those that are None; __ is a slash."""
    return lambda recipe: _put(recipe.boot, files)


def holds(files: dict[str, Any]) -> Change:
    """Add files to the application ramdisk, or take away those that are None."""
    return lambda recipe: _put(recipe.application, files)


def _put(into: dict[str, tuple[int, bytes]], files: dict[str, Any]) -> None:
    for path, one in files.items():
        if one is None:
            del into[path]
        else:
            into[path] = one


def both(*changes: Change) -> Change:
    def change(recipe: Recipe) -> None:
        for one in changes:
            one(recipe)

    return change


def runs(**options: Any) -> Change:
    """Another configuration of the application."""
    config = replace(CONFIG, **options)
    return holds({"config": (FILE, config.encode())})


def kernel(*without: Feature, release: str = "6.12.1-test", configuration: str | None = None, **header: Any) -> Change:
    proper = kernel_proper(without, release=release, configuration=configuration)
    return sets(kernel=bzimage(gzip.compress(proper, mtime=0), **header))


def cmdline(*words: str, without: str = "") -> Change:
    kept = [word for word in CMDLINE.decode().split() if not word.startswith(without or "?")]
    return sets(cmdline=" ".join([*kept, *words]).encode())


def metadata(**changes: Any) -> Change:
    return sets(metadata=json.dumps({**json.loads(METADATA), **changes}).encode())


def module(name: str = "nsm", release: str = "6.12.1-test", machine: int = 62) -> bytes:
    """A kernel module as far as its .modinfo goes."""
    info = f"name={name}\0depends=\0vermagic={release} SMP\0".encode()
    names = b"\0.shstrtab\0.modinfo\0"
    head = bytearray(elf_file(kind=1, machine=machine)[:64])
    sections = bytes(64) + _section(1, 64, len(names)) + _section(11, 64 + len(names), len(info))
    head[0x28:0x30] = (64 + len(names) + len(info)).to_bytes(8, "little")
    head[0x3A:0x40] = (64).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(2, "little")
    return bytes(head) + names + info + sections


def _section(name: int, offset: int, size: int) -> bytes:
    fields = name.to_bytes(4, "little") + bytes(20) + offset.to_bytes(8, "little") + size.to_bytes(8, "little")
    return fields + bytes(24)


KEY = b"some words\n-----BEGIN EC PRIVATE KEY-----\nMHc...\n-----END EC PRIVATE KEY-----\n"
GLIBC = "/lib64/ld-linux-x86-64.so.2"
WITH_LOADER = {
    "rootfs/lib64": (DIRECTORY, b""),
    "rootfs/lib64/ld-linux-x86-64.so.2": (PROGRAM, elf_file(kind=3)),
}


def dynamic(*needed: bytes) -> bytes:
    return elf_file(kind=3, interpreter=GLIBC.encode(), needed=needed)


def apps(data: bytes, mode: int = PROGRAM) -> Change:
    return holds({"rootfs/bin/app": (mode, data)})
