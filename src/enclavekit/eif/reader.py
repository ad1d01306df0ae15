# SPDX-License-Identifier: Apache-2.0
"""Reads an EIF's structure and leaves the sections' data where they are.

The rules are those of the strictest known loaders (QEMU hw/core/eif.c and the format's README): what is read here, they
load. Not checked here: the CRC, the measurements (``measure``), the kernel, the ramdisks and the signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

from enclavekit.eif.layout import (
    HEADER_SIZE,
    SECTION_HEADER_SIZE,
    Arch,
    Header,
    SectionHeader,
    SectionType,
)
from enclavekit.errors import EifError, TruncatedError

MAX_HELD_SIZES = {SectionType.CMDLINE: 1 << 16, SectionType.SIGNATURE: 1 << 15, SectionType.METADATA: 1 << 20}
"""Sections that are read into memory, and how large they may be. Linux takes 4096 bytes of command line at most."""

_SINCE = {SectionType.SIGNATURE: 3, SectionType.METADATA: 4}


@dataclass(frozen=True, slots=True)
class ImageSection:
    """Where a section lies; ``offset`` and ``size`` are those of its data, ``header_offset`` is 12 less."""

    type: SectionType
    header_offset: int
    size: int

    @property
    def offset(self) -> int:
        """Where the data start in the file."""
        return self.header_offset + SECTION_HEADER_SIZE

    @property
    def end(self) -> int:
        """Where the data end in the file."""
        return self.offset + self.size


@dataclass(frozen=True)
class Image:
    """The structure of a well-formed EIF. Sections are in file order; ``size`` is the whole file's."""

    header: Header
    sections: tuple[ImageSection, ...]
    size: int

    @property
    def arch(self) -> Arch:
        """The architecture that the header names."""
        return self.header.arch

    @cached_property
    def kernel(self) -> ImageSection:
        """The kernel: a bzImage on x86_64."""
        return self._all(SectionType.KERNEL)[0]

    @cached_property
    def cmdline(self) -> ImageSection:
        """The measured command line, without a NUL."""
        return self._all(SectionType.CMDLINE)[0]

    @cached_property
    def ramdisks(self) -> tuple[ImageSection, ...]:
        """At least one; the first one is the platform's, the others are the application's."""
        return self._all(SectionType.RAMDISK)

    @cached_property
    def metadata(self) -> ImageSection | None:
        """Always there from version 4 on."""
        return next(iter(self._all(SectionType.METADATA)), None)

    @cached_property
    def signature(self) -> ImageSection | None:
        """The signature, unchecked."""
        return next(iter(self._all(SectionType.SIGNATURE)), None)

    def _all(self, kind: SectionType) -> tuple[ImageSection, ...]:
        return tuple(section for section in self.sections if section.type is kind)


def read(file: BinaryIO) -> Image:
    """The structure of the EIF in a seekable file; EifError or TruncatedError for anything that is none."""
    size = file.seek(0, 2)
    header = Header.parse(_read_at(file, 0, HEADER_SIZE))
    sections: list[ImageSection] = []
    end = HEADER_SIZE
    for index, (offset, data_size) in enumerate(zip(header.offsets, header.sizes, strict=True)):
        if offset < end:
            raise EifError(f"section {index}: header at offset 0x{offset:x}, expected 0x{end:x} or later")
        if offset > size - SECTION_HEADER_SIZE:
            raise TruncatedError(f"section {index}: header at offset 0x{offset:x}, the file ends at 0x{size:x}")
        section_header = SectionHeader.parse(_read_at(file, offset, SECTION_HEADER_SIZE), offset)
        if section_header.size != data_size:
            raise EifError(
                f"section header at offset 0x{offset:x}: size 0x{section_header.size:x}, expected 0x{data_size:x}"
                " as in the EIF header"
            )
        section = ImageSection(section_header.type, offset, data_size)
        if section.end > size:
            raise TruncatedError(
                f"section {index}: {section.type} ends at 0x{section.end:x}, the file ends at 0x{size:x}"
            )
        sections.append(section)
        end = section.end
    check_sections(header.version, [(section.type, section.size) for section in sections])
    return Image(header, tuple(sections), size)


def read_section(file: BinaryIO, section: ImageSection) -> bytes:
    """The data of a command line, metadata or signature (``read`` has bounded their sizes)."""
    if section.type not in MAX_HELD_SIZES:
        raise ValueError(f"a {section.type} is not to be held in memory")
    data = _read_at(file, section.offset, section.size)
    if len(data) < section.size:
        raise TruncatedError(
            f"{section.type} at offset 0x{section.offset:x}: need {section.size} bytes, have {len(data)}"
        )
    return data


def check_sections(version: int, sections: list[tuple[SectionType, int]]) -> None:
    """EifError unless these types and sizes, in this order, make an image that every loader takes."""
    types = [kind for kind, _ in sections]
    for kind in (SectionType.KERNEL, SectionType.CMDLINE):
        if types.count(kind) != 1:
            raise EifError(f"EIF sections: {types.count(kind)} of type {kind}, expected exactly 1")
    if SectionType.RAMDISK not in types:
        raise EifError("EIF sections: 0 of type ramdisk, expected at least 1")
    if types.index(SectionType.RAMDISK) < types.index(SectionType.KERNEL):
        raise EifError("EIF sections: a ramdisk before the kernel, expected all of them after it")
    for kind, since in _SINCE.items():
        if types.count(kind) > 1:
            raise EifError(f"EIF sections: {types.count(kind)} of type {kind}, expected at most 1")
        if kind in types and version < since:
            raise EifError(f"EIF sections: {kind} in version {version}, expected version {since} or later")
    if version == max(_SINCE.values()) and SectionType.METADATA not in types:
        raise EifError(f"EIF sections: no metadata, which version {version} must have")
    for kind, size in sections:
        limit = MAX_HELD_SIZES.get(kind, size)
        if size > limit:
            raise EifError(f"EIF sections: {kind} of {size} bytes, expected at most {limit}")


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
