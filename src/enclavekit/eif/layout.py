# SPDX-License-Identifier: Apache-2.0
"""EIF, the enclave image format: the header of 548 bytes and the 12-byte header before each section's data.

Source: aws-nitro-enclaves-image-format README and src/defs/mod.rs. All integers are big-endian. Nothing is aligned; the
header's table has the place of each section header, and the size of the data after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import ClassVar, Self

from enclavekit.errors import EifError, FormatError, TruncatedError

MAGIC = b".eif"
VERSION = 4
VERSIONS = (2, 3, 4)
MAX_SECTIONS = 32
HEADER_SIZE = 548
SECTION_HEADER_SIZE = 12
CRC_OFFSET = 0x220
MAX_OFFSET = (1 << 63) - 1
"""A file can be no larger (off_t)."""

FLAG_AARCH64 = 0x0001

Report = Callable[[str, FormatError], None]
"""Told of what breaks a rule, and the rule's short name: ``refuse`` raises, a tolerant reader notes it and reads on."""


def refuse(rule: str, error: FormatError) -> None:
    """The strict reader's ``Report``."""
    del rule
    raise error


class Arch(IntEnum):
    """Bit 0 of the header's flags."""

    X86_64 = 0
    AARCH64 = 1

    def __str__(self) -> str:
        return self.name.lower()


class SectionType(IntEnum):
    """What a section holds. 0 is invalid on purpose; others than these are plain integers where they are read."""

    KERNEL = 1
    CMDLINE = 2
    RAMDISK = 3
    SIGNATURE = 4
    METADATA = 5

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Header:
    """The first 548 bytes of the file. ``default_mem`` is in bytes; hypervisors ignore it and ``default_cpus``.

    Flags but bit 0, ``reserved`` and ``unused`` are 0 in AWS's tools; others use them, so they are kept.
    """

    version: int
    flags: int
    default_mem: int
    default_cpus: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    crc: int
    reserved: int = 0
    unused: int = 0

    LAYOUT: ClassVar[Struct] = Struct(
        ">"  #        big-endian, no padding
        "4s"  # 0x000 magic
        "H"  #  0x004 version
        "H"  #  0x006 flags
        "Q"  #  0x008 default_mem, bytes
        "Q"  #  0x010 default_cpus
        "H"  #  0x018 reserved
        "H"  #  0x01a num_sections
        "32Q"  # 0x01c section_offsets, from the file's start to each section header
        "32Q"  # 0x11c section_sizes, data only
        "I"  #  0x21c unused
        "I"  #  0x220 eif_crc32, of everything but these four bytes
    )

    @property
    def arch(self) -> Arch:
        """The architecture that the kernel is for."""
        return Arch.AARCH64 if self.flags & FLAG_AARCH64 else Arch.X86_64

    def __bytes__(self) -> bytes:
        count = len(self.offsets)
        if count != len(self.sizes) or count > MAX_SECTIONS:
            raise ValueError(f"{count} offsets and {len(self.sizes)} sizes, expected as many, and at most 32")
        unused = (0,) * (MAX_SECTIONS - count)
        return self.LAYOUT.pack(
            *(MAGIC, self.version, self.flags, self.default_mem, self.default_cpus, self.reserved, count),
            *(*self.offsets, *unused),
            *(*self.sizes, *unused),
            *(self.unused, self.crc),
        )

    @classmethod
    def parse(cls, data: bytes, report: Report = refuse) -> Self:
        """From the file's first bytes. A number of sections that cannot be becomes an empty table."""
        if data[:4] != MAGIC[: len(data[:4])] or not data:
            error = EifError(f"EIF header: magic {data[:4]!r}, expected {MAGIC!r}", hint="this is not an enclave image")
            report("magic", error)
        if len(data) < HEADER_SIZE:
            raise TruncatedError(f"EIF header: need {HEADER_SIZE} bytes, have {len(data)}")
        _, version, flags, default_mem, default_cpus, reserved, count, *table, unused, crc = cls.LAYOUT.unpack_from(
            data
        )
        if version not in VERSIONS:
            report("version", EifError(f"EIF header: version {version}, expected 2, 3 or 4"))
        if not 0 < count <= MAX_SECTIONS:
            report("count", EifError(f"EIF header: {count} sections, expected 1 to {MAX_SECTIONS}"))
            count = 0
        offsets, sizes = table[:count], table[MAX_SECTIONS : MAX_SECTIONS + count]
        return cls(version, flags, default_mem, default_cpus, tuple(offsets), tuple(sizes), crc, reserved, unused)


@dataclass(frozen=True, slots=True)
class SectionHeader:
    """12 bytes before a section's data. Flags are reserved, and ignored by hypervisors."""

    type: SectionType | int
    size: int
    flags: int = 0

    LAYOUT: ClassVar[Struct] = Struct(
        ">"  #     big-endian, no padding
        "H"  # 0x0 section_type
        "H"  # 0x2 flags, reserved
        "Q"  # 0x4 section_size, bytes of data that follow
    )

    def __bytes__(self) -> bytes:
        return self.LAYOUT.pack(self.type, self.flags, self.size)

    @classmethod
    def parse(cls, data: bytes, offset: int, report: Report = refuse) -> Self:
        """From 12 bytes; ``offset``, theirs in the file, is for the message."""
        where = f"section header at offset 0x{offset:x}"
        if len(data) < SECTION_HEADER_SIZE:
            raise TruncatedError(f"{where}: need {SECTION_HEADER_SIZE} bytes, have {len(data)}")
        code, flags, size = cls.LAYOUT.unpack(data)
        if flags:
            report("section-flags", EifError(f"{where}: flags 0x{flags:04x}, expected 0x0000"))
        try:
            return cls(SectionType(code), size, flags)
        except ValueError:
            report("type", EifError(f"{where}: type {code}, expected 1 to 5"))
            return cls(code, size, flags)
