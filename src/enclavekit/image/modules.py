# SPDX-License-Identifier: Apache-2.0
"""Kernel modules that an enclave needs, and theirs, in load order, out of a kernel package's modules directory.

A module's name and its dependencies stand in its ``.modinfo`` section (linux: include/linux/module.h); the packages of
distributions leave modules.dep to be made at their installation.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator
from pathlib import Path
from struct import unpack_from

from enclavekit.codec.bzimage import Arch
from enclavekit.errors import FileError, KernelError, NoKernelError

NEEDED = ("virtio_mmio", "vmw_vsock_virtio_transport")
WELCOME = ("nsm",)
"""The security module's driver; older kernels have none."""

MAX_MODULE_SIZE = 64 << 20
MAX_FILES = 100_000
MAX_SECTIONS = 4096
ELF_MACHINES = {Arch.X86_64: 62, Arch.AARCH64: 183}
SUFFIXES = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")


def load_order(directory: Path, arch: Arch) -> list[tuple[str, bytes]]:
    """(name, ELF) of what must be loaded, dependencies first. Errors: ``NoKernelError``, ``KernelError``."""
    found, builtin = _find(directory)
    order: list[tuple[str, bytes]] = []
    done: set[str] = set()

    def visit(name: str, wanted_by: str | None) -> None:
        if name in done:
            return
        done.add(name)
        if name in builtin:
            return
        path = found.get(name)
        if path is None:
            by = f", which {wanted_by} depends on" if wanted_by else ""
            raise NoKernelError(
                f"{directory}: no module {name}{by}",
                hint="name the lib/modules/VERSION directory of the same kernel with --modules",
            )
        data = read_module(path)
        for dependency in modinfo(data, path, arch).get("depends", "").split(","):
            if dependency:
                visit(dependency.replace("-", "_"), name)
        order.append((name, data))

    for name in NEEDED:
        visit(name, None)
    for name in WELCOME:
        if name in found:
            visit(name, None)
    return order


def _find(directory: Path) -> tuple[dict[str, Path], set[str]]:
    """Modules by name, and the names of what is built in."""
    found: dict[str, Path] = {}
    if not directory.is_dir():
        raise NoKernelError(f"{directory}: no such directory of kernel modules", hint="see enclave build --help")
    for count, path in enumerate(directory.rglob("*.ko*")):
        if count > MAX_FILES:
            raise KernelError(f"{directory}: more than {MAX_FILES} files")
        for suffix in SUFFIXES:
            if path.name.endswith(suffix):
                found[path.name.removesuffix(suffix).replace("-", "_")] = path
    builtin: set[str] = set()
    listed = directory / "modules.builtin"
    if listed.is_file():
        builtin = {Path(line).name.removesuffix(".ko").replace("-", "_") for line in listed.read_text().splitlines()}
    return found, builtin


def read_module(path: Path) -> bytes:
    """A module, decompressed: the order of loading is measured, the compressor's whims are not."""
    try:
        if path.name.endswith(".xz"):
            with lzma.open(path) as xz:
                data = xz.read(MAX_MODULE_SIZE + 1)
        elif path.name.endswith(".gz"):
            with gzip.open(path) as gz:
                data = gz.read(MAX_MODULE_SIZE + 1)
        elif path.name.endswith(".zst"):
            raise KernelError(f"{path}: compressed with zstd, expected xz, gzip or none", hint="unpack it with zstd -d")
        else:
            data = path.read_bytes()
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    except (lzma.LZMAError, EOFError) as error:
        raise KernelError(f"{path}: cannot decompress it: {error}") from error
    if len(data) > MAX_MODULE_SIZE:
        raise KernelError(f"{path}: more than {MAX_MODULE_SIZE} bytes")
    return data


def modinfo(data: bytes, path: Path, arch: Arch) -> dict[str, str]:
    """``key=value`` strings of the .modinfo section; of repeated keys the last. Errors: ``KernelError``."""
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64:
        raise KernelError(f"{path}: not a 64-bit little-endian ELF file")
    machine = unpack_from("<H", data, 18)[0]
    if machine != ELF_MACHINES[arch]:
        raise KernelError(f"{path}: ELF machine {machine}, expected {ELF_MACHINES[arch]} ({arch})")
    for name, offset, size in _elf_sections(data, path):
        if name == b".modinfo":
            strings = data[offset : offset + size].split(b"\0")
            pairs = (string.decode(errors="replace").partition("=") for string in strings if string)
            return {key: value for key, _, value in pairs}
    raise KernelError(f"{path}: no .modinfo section, so not a kernel module")


def _elf_sections(data: bytes, path: Path) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) of each section (ELF-64, section header table)."""
    table = unpack_from("<Q", data, 40)[0]
    entry_size, count, names_index = unpack_from("<HHH", data, 58)
    if entry_size != 64 or count > MAX_SECTIONS or names_index >= count or table + 64 * count > len(data):
        raise KernelError(f"{path}: a broken section header table")
    headers = [unpack_from("<IIQQQQ", data, table + 64 * number) for number in range(count)]
    names = headers[names_index][4]
    for name, _, _, _, offset, size in headers:
        start = names + name
        yield data[start : start + 32].split(b"\0", 1)[0], offset, size
