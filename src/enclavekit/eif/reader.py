# SPDX-License-Identifier: Apache-2.0
"""Reads an EIF's structure and leaves the sections' data where they are: one parser, strict or tolerant.

``read`` takes what the strictest known loaders take (QEMU hw/core/eif.c, the format's README) and refuses the rest.
``inspect`` notes what breaks a rule as a ``Remark`` and reads on as far as anything can be understood, to look at a
damaged or foreign image, or to mend it. Not checked here: the CRC and the measurements (``measure``), the kernel, the
ramdisks and the signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import BinaryIO

from enclavekit.eif.layout import (
    FLAG_AARCH64,
    HEADER_SIZE,
    MAX_SECTIONS,
    SECTION_HEADER_SIZE,
    Arch,
    Header,
    Report,
    SectionHeader,
    SectionType,
    refuse,
)
from enclavekit.errors import EifError, FormatError, TruncatedError

MAX_HELD_SIZES = {SectionType.CMDLINE: 1 << 16, SectionType.SIGNATURE: 1 << 15, SectionType.METADATA: 1 << 20}
"""Sections that are read into memory, and how large they may be. Linux takes 4096 bytes of command line at most."""

_SINCE = {SectionType.SIGNATURE: 3, SectionType.METADATA: 4}


@dataclass(frozen=True, slots=True)
class Remark:
    """Something odd. ``rule`` is a short stable name; ``refused``: by some hypervisor, and so by ``read``."""

    rule: str
    message: str
    refused: bool = True


@dataclass(frozen=True, slots=True)
class ImageSection:
    """Where a section lies; ``offset`` and ``size`` are those of its data, ``header_offset`` is 12 less."""

    type: SectionType | int
    header_offset: int
    size: int
    flags: int = 0

    @property
    def offset(self) -> int:
        """Where the data start in the file."""
        return self.header_offset + SECTION_HEADER_SIZE

    @property
    def end(self) -> int:
        """Where the data end in the file."""
        return self.offset + self.size

    @property
    def kind(self) -> str:
        """The type in a word: kernel, cmdline, ramdisk, signature, metadata, or type-N for what is none of these."""
        return str(self.type) if isinstance(self.type, SectionType) else f"type-{self.type}"


@dataclass(frozen=True)
class Image:
    """A structure; ``size`` is the file's. Sections are in file order. Of ``read``, no remark is ``refused``."""

    header: Header
    sections: tuple[ImageSection, ...]
    size: int
    remarks: tuple[Remark, ...] = ()

    @property
    def arch(self) -> Arch:
        """The architecture that the header names."""
        return self.header.arch

    @cached_property
    def kernel(self) -> ImageSection:
        """The kernel: a bzImage on x86_64. EifError in an inspected image without one."""
        return self._one(SectionType.KERNEL)

    @cached_property
    def cmdline(self) -> ImageSection:
        """The measured command line, without a NUL. EifError in an inspected image without one."""
        return self._one(SectionType.CMDLINE)

    @cached_property
    def ramdisks(self) -> tuple[ImageSection, ...]:
        """At least one, unless inspected; the first one is the platform's, the others are the application's."""
        return self._all(SectionType.RAMDISK)

    @cached_property
    def metadata(self) -> ImageSection | None:
        """Always there from version 4 on, unless inspected."""
        return next(iter(self._all(SectionType.METADATA)), None)

    @cached_property
    def signature(self) -> ImageSection | None:
        """The signature, unchecked."""
        return next(iter(self._all(SectionType.SIGNATURE)), None)

    @property
    def packed(self) -> bool:
        """Whether sections follow one another with nothing between them, nor behind the last."""
        return not any(remark.rule in ("gap", "trailing") for remark in self.remarks)

    @property
    def refusals(self) -> tuple[Remark, ...]:
        """Why hypervisors refuse this image."""
        return tuple(remark for remark in self.remarks if remark.refused)

    def _all(self, kind: SectionType) -> tuple[ImageSection, ...]:
        return tuple(section for section in self.sections if section.type is kind)

    def _one(self, kind: SectionType) -> ImageSection:
        found = self._all(kind)
        if not found:
            raise EifError(f"EIF sections: 0 of type {kind}, expected exactly 1")
        return found[0]


def read(file: BinaryIO) -> Image:
    """The structure of the EIF in a seekable file; EifError or TruncatedError for one that hypervisors refuse."""
    return _parse(file, refuse, [])


def inspect(file: BinaryIO) -> Image:
    """The same of any image that can be understood at all; what ``read`` would have refused is in its remarks.

    A size that the table and the section give differently is taken to be the one after which the next section comes.
    EifError or TruncatedError when there is no whole header, or no section.
    """
    remarks: list[Remark] = []
    image = _parse(file, lambda rule, error: remarks.append(Remark(rule, error.message)), remarks)
    types = [section.type for section in image.sections]
    # Any file has bytes where sections could be; without the magic it takes more to call it an image.
    wanted = {SectionType.KERNEL, SectionType.CMDLINE} if remarks and remarks[0].rule == "magic" else set()
    if not any(isinstance(one, SectionType) for one in types) or not wanted <= set(types):
        raise EifError(f"{remarks[0].message}; no sections were found", hint="this is not an enclave image")
    return image


def read_section(file: BinaryIO, section: ImageSection) -> bytes:
    """The data of a command line, metadata or signature; EifError when they are too large to be one."""
    limit = MAX_HELD_SIZES.get(section.type) if isinstance(section.type, SectionType) else None
    if limit is None:
        raise ValueError(f"a {section.kind} is not to be held in memory")
    if section.size > limit:
        raise _too_large(section.kind, section.size, limit)
    data = _read_at(file, section.offset, section.size)
    if len(data) < section.size:
        raise TruncatedError(
            f"{section.kind} at offset 0x{section.offset:x}: need {section.size} bytes, have {len(data)}"
        )
    return data


def check_sections(version: int, sections: Sequence[tuple[SectionType | int, int]], report: Report = refuse) -> None:
    """Report unless these types and sizes, in this order, make an image that every loader takes."""
    types = [kind for kind, _ in sections]
    for kind in (SectionType.KERNEL, SectionType.CMDLINE):
        if types.count(kind) != 1:
            rule = "duplicate" if kind in types else "missing"
            report(rule, EifError(f"EIF sections: {types.count(kind)} of type {kind}, expected exactly 1"))
    if SectionType.RAMDISK not in types:
        report("missing", EifError("EIF sections: 0 of type ramdisk, expected at least 1"))
    elif SectionType.KERNEL in types and types.index(SectionType.RAMDISK) < types.index(SectionType.KERNEL):
        report("order", EifError("EIF sections: a ramdisk before the kernel, expected all of them after it"))
    for kind, since in _SINCE.items():
        if types.count(kind) > 1:
            report("duplicate", EifError(f"EIF sections: {types.count(kind)} of type {kind}, expected at most 1"))
        if kind in types and version < since:
            message = f"EIF sections: {kind} in version {version}, expected version {since} or later"
            report("since", EifError(message))
    if version == max(_SINCE.values()) and SectionType.METADATA not in types:
        report("missing", EifError(f"EIF sections: no metadata, which version {version} must have"))
    for held, size in sections:
        limit = MAX_HELD_SIZES.get(held, size) if isinstance(held, SectionType) else size
        if size > limit:
            report("size", _too_large(str(held), size, limit))


def _parse(file: BinaryIO, report: Report, remarks: list[Remark]) -> Image:
    size = file.seek(0, 2)
    header = Header.parse(_read_at(file, 0, HEADER_SIZE), report)
    sections = _sections(file, size, header, report)
    check_sections(header.version, [(section.type, section.size) for section in sections], report)
    remarks.extend(_notes(header, sections, size))
    return Image(header, tuple(sections), size, tuple(remarks))


def _sections(file: BinaryIO, size: int, header: Header, report: Report) -> list[ImageSection]:
    sections: list[ImageSection] = []
    end = HEADER_SIZE
    table: list[tuple[int, int | None]] = list(zip(header.offsets, header.sizes, strict=True))
    # Without a table that can be believed, section follows section: so does upstream's reader find them in any case.
    walking = not table
    while len(sections) < (MAX_SECTIONS if walking else len(table)):
        index = len(sections)
        if walking and size - end < SECTION_HEADER_SIZE:
            break
        offset, expected = (end, None) if walking else table[index]
        where = f"section {index}: header at offset 0x{offset:x}"
        if offset < end:
            report("table", EifError(f"{where}, expected 0x{end:x} or later"))
            offset = end
        if offset > size - SECTION_HEADER_SIZE:
            report("table", TruncatedError(f"{where}, the file ends at 0x{size:x}"))
            offset = end
            if offset > size - SECTION_HEADER_SIZE:
                break
        head = SectionHeader.parse(_read_at(file, offset, SECTION_HEADER_SIZE), offset, report)
        section = ImageSection(head.type, offset, head.size, head.flags)
        if expected is not None and head.size != expected:
            message = f"section header at offset 0x{offset:x}: size 0x{head.size:x}, expected 0x{expected:x}"
            report("sizes", EifError(f"{message} as in the EIF header"))
            section = _sized(section, expected, table[index + 1][0] if index + 1 < len(table) else size, size)
        if section.end > size:
            message = f"section {index}: {section.kind} ends at 0x{section.end:x}, the file ends at 0x{size:x}"
            report("truncated", TruncatedError(message))
            section = replace(section, size=size - section.offset)
        sections.append(section)
        end = section.end
    return sections


def _sized(section: ImageSection, other: int, following: int, size: int) -> ImageSection:
    """Of two sizes the one after which the next section, or the file's end, comes; else the one that fits."""
    ours, theirs = section, replace(section, size=other)
    for one in (ours, theirs):
        if one.end == following:
            return one
    return ours if ours.end <= size else theirs


def _notes(header: Header, sections: Sequence[ImageSection], size: int) -> list[Remark]:
    """What hypervisors take, and is worth knowing all the same."""
    notes = []
    unknown = header.flags & ~FLAG_AARCH64
    if unknown:
        notes.append(Remark("header-flags", f"unknown header flags 0x{unknown:04x}", refused=False))
    if header.reserved or header.unused:
        message = f"reserved header fields 0x{header.reserved:04x} and 0x{header.unused:08x}, expected 0"
        notes.append(Remark("reserved", message, refused=False))
    ends = [HEADER_SIZE, *(section.end for section in sections)]
    gaps = [end for end, section in zip(ends, sections, strict=False) if section.header_offset != end]
    if gaps:
        message = f"a gap between sections at offset 0x{gaps[0]:x}: some tools cannot read this image"
        notes.append(Remark("gap", message, refused=False))
    if size > ends[-1]:
        message = f"{size - ends[-1]} bytes behind the last section"
        if size - ends[-1] >= SECTION_HEADER_SIZE:
            message += ", which nitro-cli takes for one more"
        notes.append(Remark("trailing", message, refused=False))
    return notes


def _too_large(kind: str, size: int, limit: int) -> FormatError:
    return EifError(f"EIF sections: {kind} of {size} bytes, expected at most {limit}")


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
