# SPDX-License-Identifier: Apache-2.0
"""Kernel modules: the ones that an enclave needs, with all that they depend on, in load order.

Source: System V ABI (ELF-64), linux scripts/mod/modpost.c for the ``.modinfo`` section (NUL-terminated ``key=value``).
``depmod`` is not needed: a module names what it depends on.
"""

from __future__ import annotations

import gzip
import lzma
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from struct import Struct

from enclavekit.eif import Arch
from enclavekit.errors import FileError, KernelError, NoKernelError

REQUIRED = ("virtio_mmio", "vmw_vsock_virtio_transport")
OPTIONAL = ("nsm",)
"""Older kernels have no NSM driver; without it an enclave runs, and cannot attest."""

MAX_MODULE_SIZE = 64 << 20
MAX_FILES = 1 << 16
MAX_CLOSURE = 100
XZ_MEMORY = 128 << 20

_ELF_IDENT = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_ELF_MACHINES = {Arch.X86_64: 62, Arch.AARCH64: 183}
_SUFFIXES = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")

_ELF_HEADER = Struct(
    "<"  #     little-endian
    "16x"  # 0x00 e_ident
    "2x"  #  e_type
    "H"  # 0x12 e_machine
    "20x"  # e_version, e_entry, e_phoff
    "Q"  # 0x28 e_shoff, of the section headers
    "10x"  # e_flags, e_ehsize, e_phentsize, e_phnum
    "H"  # 0x3a e_shentsize
    "H"  # 0x3c e_shnum
    "H"  # 0x3e e_shstrndx, of the section that holds the names
)
_SECTION_HEADER = Struct(
    "<"  #     little-endian
    "I"  # 0x00 sh_name, offset in the section of names
    "20x"  # sh_type, sh_flags, sh_addr
    "Q"  # 0x18 sh_offset, in the file
    "Q"  # 0x20 sh_size
    "24x"  # sh_link, sh_info, sh_addralign, sh_entsize
)


@dataclass(frozen=True, slots=True)
class Module:
    """A module, uncompressed. ``release`` is the kernel's that it was made for."""

    name: str
    data: bytes
    depends: tuple[str, ...]
    release: str


@dataclass(frozen=True, slots=True)
class Modules:
    """In load order; ``missing`` names the optional ones that this kernel does not have."""

    modules: tuple[Module, ...] = ()
    missing: tuple[str, ...] = ()


def resolve(
    directory: Path | None,
    *,
    arch: Arch,
    release: str,
    required: Sequence[str] = REQUIRED,
    optional: Sequence[str] = OPTIONAL,
) -> Modules:
    """What a kernel needs, from its ``lib/modules/<release>``. No directory: it has all built in. "": any release."""
    if directory is None:
        return Modules()
    files, builtin = _index(directory), _builtin(directory)
    loaded: dict[str, Module] = {}
    missing: list[str] = []
    for name in (*required, *optional):
        if name in files:
            _load(name, files, loaded, arch=arch, release=release)
        elif name not in builtin and name in optional:
            missing.append(name)
        elif name not in builtin:
            raise NoKernelError(
                f"{directory}: no module {name}",
                hint="an enclave's kernel needs virtio_mmio and vsock, built in or as modules",
            )
    return Modules(tuple(loaded.values()), tuple(missing))


def parse_module(data: bytes, where: str, arch: Arch) -> Module:
    """From an uncompressed ``.ko``; KernelError when it is none for this architecture."""
    info: dict[str, str] = {}
    for record in _modinfo(data, where, arch).split(b"\0"):
        key, _, value = record.partition(b"=")
        info.setdefault(key.decode("ascii", "replace"), value.decode("ascii", "replace"))
    name = info.get("name", "")
    if not name.isidentifier() or not name.isascii():
        raise KernelError(f"{where}: module name {name[:64]!r}, expected letters, digits and _")
    depends = tuple(one.replace("-", "_") for one in info.get("depends", "").split(",") if one)
    return Module(name, data, depends, info.get("vermagic", "").partition(" ")[0])


def _load(
    name: str,
    files: Mapping[str, Path],
    loaded: dict[str, Module],
    above: tuple[str, ...] = (),
    *,
    arch: Arch,
    release: str,
) -> None:
    """Depth first: what a module depends on is loaded before it."""
    if name in loaded:
        return
    path = files.get(name)
    if path is None:
        raise NoKernelError(f"module {above[-1]}: depends on {name}, which is not there")
    if name in above or len(above) > MAX_CLOSURE or len(loaded) >= MAX_CLOSURE:
        raise KernelError(f"module {name}: depends on itself, or on more than {MAX_CLOSURE} others")
    module = parse_module(_uncompressed(path), str(path), arch)
    if module.name != name:
        raise KernelError(f"{path}: holds module {module.name}, expected {name}")
    if release and module.release != release:
        raise KernelError(
            f"{path}: made for kernel {module.release!r}, expected {release!r}",
            hint="give the modules directory that belongs to the kernel",
        )
    for dependency in module.depends:
        _load(dependency, files, loaded, (*above, name), arch=arch, release=release)
    loaded[name] = module


def _index(directory: Path) -> dict[str, Path]:
    """Module files by name. Names have _ where their files may have -."""
    found: dict[str, Path] = {}

    def refuse(error: OSError) -> None:
        raise FileError.of(error, directory, "read") from error

    count = 0
    for folder, folders, names in os.walk(directory, onerror=refuse):
        folders[:] = sorted(one for one in folders if one not in ("build", "source"))
        count += len(names)
        if count > MAX_FILES:
            raise KernelError(f"{directory}: more than {MAX_FILES} files, expected a modules directory")
        for name in sorted(names):
            if name.endswith(_SUFFIXES):
                found.setdefault(name.partition(".ko")[0].replace("-", "_"), Path(folder, name))
    return found


def _builtin(directory: Path) -> set[str]:
    try:
        lines = (directory / "modules.builtin").read_text("utf-8", "replace").split()
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise FileError.of(error, directory / "modules.builtin", "read") from error
    return {line.rpartition("/")[2].partition(".ko")[0].replace("-", "_") for line in lines}


def _uncompressed(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            packed = file.read(MAX_MODULE_SIZE + 1)
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    try:
        if path.suffix == ".xz":
            unpacker = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            data = unpacker.decompress(packed, MAX_MODULE_SIZE + 1)
            if len(data) <= MAX_MODULE_SIZE and not unpacker.eof:
                raise EOFError("it ends too early")
        elif path.suffix == ".gz":
            with gzip.GzipFile(fileobj=BytesIO(packed)) as unpacked:
                data = unpacked.read(MAX_MODULE_SIZE + 1)
        elif path.suffix == ".zst":
            raise KernelError(
                f"{path}: compressed with zstd, expected xz, gzip or none", hint=f"unpack it: zstd -d {path}"
            )
        else:
            data = packed
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise KernelError(f"{path}: broken compressed data: {str(error).lower()}") from error
    if len(data) > MAX_MODULE_SIZE:
        raise KernelError(f"{path}: more than {MAX_MODULE_SIZE} bytes, expected a kernel module")
    return data


def _modinfo(data: bytes, where: str, arch: Arch) -> bytes:
    if len(data) < _ELF_HEADER.size or not data.startswith(_ELF_IDENT):
        raise KernelError(f"{where}: not a 64-bit little-endian ELF file, expected a kernel module")
    machine, table, entry_size, count, names_index = _ELF_HEADER.unpack_from(data)
    if machine != _ELF_MACHINES[arch]:
        raise KernelError(f"{where}: ELF machine {machine}, expected {_ELF_MACHINES[arch]} ({arch})")
    if entry_size != _SECTION_HEADER.size or names_index >= count or table + count * entry_size > len(data):
        raise KernelError(f"{where}: ELF section headers at 0x{table:x} lie outside of the file")
    sections = [_SECTION_HEADER.unpack_from(data, table + index * entry_size) for index in range(count)]
    _, names_offset, names_size = sections[names_index]
    names = data[names_offset : names_offset + names_size]
    for name, offset, size in sections:
        if names[name : name + 9] == b".modinfo\0":
            if offset + size > len(data):
                raise KernelError(f"{where}: section .modinfo ends at 0x{offset + size:x}, the file at 0x{len(data):x}")
            return data[offset : offset + size]
    raise KernelError(f"{where}: no section .modinfo, expected a kernel module")
