# SPDX-License-Identifier: Apache-2.0
"""ELF executables and libraries: what a kernel and a dynamic loader look for in one, and no more.

Source: System V ABI (ELF-32, ELF-64), linux fs/binfmt_elf.c for the limits. Program headers are read, not sections, so
a stripped file is as good as any. 32 and 64 bits, either byte order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import NamedTuple, Self

from enclavekit.errors import FormatError, TruncatedError

MAGIC = b"\x7fELF"
MAX_PROGRAM_HEADERS_SIZE = 1 << 16
"""Bytes of all program headers; the kernel runs nothing with more."""
MAX_PATH_SIZE = 4096
"""PATH_MAX, with its NUL: of an interpreter, and here of every string."""
MAX_DYNAMIC_SIZE = 1 << 20
MAX_NEEDED = 1024

ReadAt = Callable[[int, int], bytes]
"""The bytes at an offset, so many or as many as there are."""

_IDENT_SIZE = 16
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 10, 15, 29


class Machine(IntEnum):
    """``e_machine`` of what Linux runs enclaves on, and of what is found in images by mistake."""

    I386 = 3
    ARM = 40
    X86_64 = 62
    AARCH64 = 183
    RISCV = 243


class ElfType(IntEnum):
    """``e_type``. A position-independent program is a DYN, as a library is."""

    NONE = 0
    REL = 1
    EXEC = 2
    DYN = 3
    CORE = 4


class _Class(NamedTuple):
    """The three layouts of one word size, without their byte order."""

    header: str
    program_header: str
    dynamic: str


_CLASSES = {
    1: _Class(
        header=(
            "H"  # 0x10 e_type
            "H"  # 0x12 e_machine
            "8x"  #     e_version, e_entry
            "I"  # 0x1c e_phoff, of the program headers
            "10x"  #    e_shoff, e_flags, e_ehsize
            "H"  # 0x2a e_phentsize
            "H"  # 0x2c e_phnum
            "6x"  #     e_shentsize, e_shnum, e_shstrndx
        ),
        program_header=(
            "I"  # 0x00 p_type
            "I"  # 0x04 p_offset, in the file
            "I"  # 0x08 p_vaddr
            "4x"  #     p_paddr
            "I"  # 0x10 p_filesz, bytes
            "12x"  #    p_memsz, p_flags, p_align
        ),
        dynamic=(
            "I"  # 0x00 d_tag
            "I"  # 0x04 d_val or d_ptr
        ),
    ),
    2: _Class(
        header=(
            "H"  # 0x10 e_type
            "H"  # 0x12 e_machine
            "12x"  #    e_version, e_entry
            "Q"  # 0x20 e_phoff, of the program headers
            "14x"  #    e_shoff, e_flags, e_ehsize
            "H"  # 0x36 e_phentsize
            "H"  # 0x38 e_phnum
            "6x"  #     e_shentsize, e_shnum, e_shstrndx
        ),
        program_header=(
            "I"  # 0x00 p_type
            "4x"  #     p_flags
            "Q"  # 0x08 p_offset, in the file
            "Q"  # 0x10 p_vaddr
            "8x"  #     p_paddr
            "Q"  # 0x20 p_filesz, bytes
            "16x"  #    p_memsz, p_align
        ),
        dynamic=(
            "Q"  # 0x00 d_tag
            "Q"  # 0x08 d_val or d_ptr
        ),
    ),
}
_BYTE_ORDERS = {1: "<", 2: ">"}


class _Segment(NamedTuple):
    type: int
    offset: int
    address: int
    size: int


@dataclass(frozen=True, slots=True)
class Elf:
    """A file's kind and what it asks for. Paths are bytes as they stand; ``$ORIGIN`` is not replaced.

    ``interpreter`` is None in a static program and in libraries; ``dynamic`` says whether there is anything to link.
    """

    bits: int
    little_endian: bool
    type: int
    machine: int
    dynamic: bool
    interpreter: bytes | None = None
    needed: tuple[bytes, ...] = ()
    rpath: bytes | None = None
    runpath: bytes | None = None

    @property
    def machine_name(self) -> str:
        """Of the architecture, or its number."""
        return Machine(self.machine).name.lower() if self.machine in list(Machine) else f"machine {self.machine}"

    @classmethod
    def parse(cls, read_at: ReadAt) -> Self:
        """From random access to a file. Whatever the bytes, this returns, or raises FormatError or TruncatedError."""
        ident = read_at(0, _IDENT_SIZE)
        if not ident.startswith(MAGIC):
            raise FormatError(f"ELF header: magic {ident[:4]!r}, expected {MAGIC!r}")
        if len(ident) < _IDENT_SIZE:
            raise TruncatedError(f"ELF header: need {_IDENT_SIZE} bytes, have {len(ident)}")
        size_class, byte_order = ident[4], ident[5]
        if size_class not in _CLASSES:
            raise FormatError(f"ELF header: class {size_class}, expected 1 (32 bits) or 2 (64 bits)")
        if byte_order not in _BYTE_ORDERS:
            raise FormatError(f"ELF header: byte order {byte_order}, expected 1 (little-endian) or 2 (big-endian)")
        order = _BYTE_ORDERS[byte_order]
        header, program_header, dynamic = (Struct(order + layout) for layout in _CLASSES[size_class])
        kind, machine, offset, entry_size, count = header.unpack(_read(read_at, _IDENT_SIZE, header.size, "header"))
        segments = _segments(read_at, program_header, offset, entry_size, count)
        strings: dict[str, bytes | None] = {}
        needed: tuple[bytes, ...] = ()
        found = _first(segments, _PT_DYNAMIC)
        if found:
            needed, strings = _dynamic(read_at, dynamic, found, segments)
        return cls(
            bits=32 * size_class,
            little_endian=order == "<",
            type=kind,
            machine=machine,
            dynamic=found is not None,
            interpreter=_interpreter(read_at, segments),
            needed=needed,
            **strings,
        )


def _segments(read_at: ReadAt, layout: Struct, offset: int, entry_size: int, count: int) -> list[_Segment]:
    if not count:
        return []
    if entry_size != layout.size:
        raise FormatError(f"ELF header: program headers of {entry_size} bytes, expected {layout.size}")
    if count * entry_size > MAX_PROGRAM_HEADERS_SIZE:
        raise FormatError(
            f"ELF header: {count} program headers, expected at most {MAX_PROGRAM_HEADERS_SIZE // entry_size}"
        )
    table = _read(read_at, offset, count * entry_size, "program headers")
    return [_Segment(*fields) for fields in layout.iter_unpack(table)]


def _first(segments: Sequence[_Segment], kind: int) -> _Segment | None:
    return next((segment for segment in segments if segment.type == kind), None)


def _interpreter(read_at: ReadAt, segments: Sequence[_Segment]) -> bytes | None:
    segment = _first(segments, _PT_INTERP)
    if segment is None:
        return None
    if not 2 <= segment.size <= MAX_PATH_SIZE:
        raise FormatError(f"ELF interpreter: path of {segment.size} bytes, expected 2 to {MAX_PATH_SIZE}")
    path = _read(read_at, segment.offset, segment.size, "interpreter")
    if path[-1]:
        raise FormatError("ELF interpreter: path does not end with a NUL")
    return path.partition(b"\0")[0]


def _dynamic(
    read_at: ReadAt, layout: Struct, segment: _Segment, segments: Sequence[_Segment]
) -> tuple[tuple[bytes, ...], dict[str, bytes | None]]:
    """What is needed, and the single strings by their names in ``Elf``."""
    if segment.size > MAX_DYNAMIC_SIZE:
        raise FormatError(f"ELF dynamic section: {segment.size} bytes, expected at most {MAX_DYNAMIC_SIZE}")
    table = _read(read_at, segment.offset, segment.size - segment.size % layout.size, "dynamic section")
    values: dict[int, int] = {}
    needed: list[int] = []
    for tag, value in _entries(layout, table):
        if tag == _DT_NEEDED:
            needed.append(value)
        else:
            values[tag] = value
    if len(needed) > MAX_NEEDED:
        raise FormatError(f"ELF dynamic section: {len(needed)} libraries, expected at most {MAX_NEEDED}")
    wanted = {"rpath": _DT_RPATH, "runpath": _DT_RUNPATH}
    strings = {name: values[tag] for name, tag in wanted.items() if tag in values}
    if not needed and not strings:
        return (), {}
    if _DT_STRTAB not in values or _DT_STRSZ not in values:
        raise FormatError("ELF dynamic section: names of libraries, and no table of strings")
    start, size = _file_offset(segments, values[_DT_STRTAB]), values[_DT_STRSZ]

    def string(offset: int) -> bytes:
        if offset >= size:
            raise FormatError(f"ELF dynamic section: string at 0x{offset:x} of a table of 0x{size:x} bytes")
        data = read_at(start + offset, min(MAX_PATH_SIZE, size - offset))
        text, nul, _ = data.partition(b"\0")
        if not nul:
            raise FormatError(f"ELF dynamic section: string at 0x{offset:x} has no NUL within {len(data)} bytes")
        return text

    return tuple(string(offset) for offset in needed), {name: string(offset) for name, offset in strings.items()}


def _entries(layout: Struct, table: bytes) -> Iterator[tuple[int, int]]:
    for tag, value in layout.iter_unpack(table):
        if tag == _DT_NULL:
            return
        yield tag, value


def _file_offset(segments: Sequence[_Segment], address: int) -> int:
    for segment in segments:
        if segment.type == _PT_LOAD and 0 <= address - segment.address < segment.size:
            return segment.offset + address - segment.address
    raise FormatError(f"ELF dynamic section: table of strings at address 0x{address:x}, which no segment holds")


def _read(read_at: ReadAt, offset: int, size: int, what: str) -> bytes:
    data = read_at(offset, size)
    if len(data) < size:
        raise TruncatedError(f"ELF {what} at offset 0x{offset:x}: need {size} bytes, have {len(data)}")
    return data
