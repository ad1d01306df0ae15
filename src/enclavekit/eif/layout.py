# SPDX-License-Identifier: Apache-2.0
"""EIF, the enclave image format: one header, then sections, back to back; all integers big-endian (docs/eif.md)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import ClassVar, Self

from enclavekit.codec.bzimage import Arch
from enclavekit.errors import EifError, TruncatedError

MAGIC = b".eif"
VERSION = 4
READABLE_VERSIONS = (2, 3, 4)
MAX_SECTIONS = 32
DEFAULT_MEMORY = 1 << 30
"""Bytes; hypervisors ignore it."""
DEFAULT_CPUS = 2
"""Ignored as well."""
SIGNATURE_MAX_SIZE = 32768
METADATA_VERSION = 4
"""From this version on a metadata section must be there."""


class SectionType(IntEnum):
    """What a section holds; 0 and all others make an image invalid."""

    KERNEL = 1
    CMDLINE = 2
    RAMDISK = 3
    SIGNATURE = 4
    METADATA = 5

    @property
    def label(self) -> str:
        """As it is written in descriptions: ``Kernel``."""
        return self.name.capitalize()


class HeaderFlag(IntFlag):
    """Bits of the header's flags; unknown ones are kept."""

    AARCH64 = 1


@dataclass(frozen=True, slots=True)
class Header:
    """EIF header, 548 bytes. Slots of the tables past ``num_sections`` are 0; their order is the file's."""

    LAYOUT: ClassVar[Struct] = Struct(
        ">"  #    big-endian, no padding
        "4s"  #   0x000 magic
        "H"  #    0x004 version
        "H"  #    0x006 flags
        "Q"  #    0x008 default memory, bytes
        "Q"  #    0x010 default CPUs
        "H"  #    0x018 reserved
        "H"  #    0x01a number of sections
        "32Q"  #  0x01c offsets of the section headers in the file
        "32Q"  #  0x11c sizes of the sections' data, bytes
        "I"  #    0x21c unused
        "I"  #    0x220 CRC-32 of everything but this field
    )
    CRC_OFFSET: ClassVar[int] = 0x220

    version: int
    flags: HeaderFlag
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    crc: int = 0
    default_memory: int = DEFAULT_MEMORY
    default_cpus: int = DEFAULT_CPUS

    @property
    def arch(self) -> Arch:
        """The architecture that the image is for."""
        return Arch.AARCH64 if self.flags & HeaderFlag.AARCH64 else Arch.X86_64

    def __bytes__(self) -> bytes:
        """548 bytes."""
        unused = (0,) * (MAX_SECTIONS - len(self.offsets))
        return self.LAYOUT.pack(
            MAGIC,
            self.version,
            self.flags,
            self.default_memory,
            self.default_cpus,
            0,
            len(self.offsets),
            *self.offsets,
            *unused,
            *self.sizes,
            *unused,
            0,
            self.crc,
        )

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Length, magic and count are checked here, what depends on the file in ``reader``."""
        if len(data) < cls.LAYOUT.size:
            if not data.startswith(MAGIC[: len(data)]) or not data:
                raise EifError(f"not an EIF: got {data[:4]!r} at offset 0x000, expected {MAGIC!r}")
            raise TruncatedError(f"EIF header at offset 0x000: need {cls.LAYOUT.size} bytes, have {len(data)}")
        magic, version, flags, memory, cpus, _, count, *tables, _, crc = cls.LAYOUT.unpack_from(data)
        if magic != MAGIC:
            raise EifError(f"not an EIF: got {magic!r} at offset 0x000, expected {MAGIC!r}")
        if version not in READABLE_VERSIONS:
            raise EifError(f"EIF version at offset 0x004: got {version}, expected 2, 3 or 4")
        if not 2 <= count <= MAX_SECTIONS:
            raise EifError(f"EIF section count at offset 0x01a: got {count}, expected 2 to {MAX_SECTIONS}")
        offsets, sizes = tables[:count], tables[MAX_SECTIONS : MAX_SECTIONS + count]
        return cls(version, HeaderFlag(flags), tuple(offsets), tuple(sizes), crc, memory, cpus)


@dataclass(frozen=True, slots=True)
class SectionHeader:
    """Section header, 12 bytes, before the section's data."""

    LAYOUT: ClassVar[Struct] = Struct(
        ">"  #  big-endian, no padding
        "H"  # 0x0 section type
        "H"  # 0x2 flags, reserved
        "Q"  # 0x4 size of the data that follow, bytes
    )
    type: SectionType
    size: int

    def __bytes__(self) -> bytes:
        """12 bytes."""
        return self.LAYOUT.pack(self.type, 0, self.size)

    @classmethod
    def parse(cls, data: bytes, offset: int) -> Self:
        """``data`` are the 12 bytes at ``offset`` of the file."""
        if len(data) < cls.LAYOUT.size:
            raise TruncatedError(
                f"section header at offset 0x{offset:x}: need {cls.LAYOUT.size} bytes, have {len(data)}"
            )
        code, flags, size = cls.LAYOUT.unpack(data)
        if code not in list(SectionType):
            raise EifError(f"section header at offset 0x{offset:x}: got type {code}, expected 1 to {max(SectionType)}")
        if flags:
            raise EifError(f"section header at offset 0x{offset:x}: got flags 0x{flags:04x}, expected 0")
        return cls(SectionType(code), size)
