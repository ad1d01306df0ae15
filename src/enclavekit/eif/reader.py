# SPDX-License-Identifier: Apache-2.0
"""Reading an EIF as strictly as a hypervisor does; section data is not read, only found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

from enclavekit.codec import bzimage
from enclavekit.codec.bzimage import Arch
from enclavekit.eif.layout import METADATA_VERSION, SIGNATURE_MAX_SIZE, Header, SectionHeader, SectionType
from enclavekit.errors import EifError, FileError, TruncatedError

MAX_METADATA_SIZE = 1 << 20
"""Bytes of metadata that are looked at; upstream's custom part is limited to 4 KiB."""
MAX_CMDLINE_SIZE = 1 << 16


@dataclass(frozen=True, slots=True)
class Section:
    """Where a section's data lie in the file, in bytes."""

    type: SectionType
    offset: int
    size: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class Image:
    """An EIF that a hypervisor would accept, but for its CRC and signature, which take reading all of it."""

    header: Header
    sections: tuple[Section, ...]
    size: int
    """Of the file, in bytes."""

    @property
    def arch(self) -> Arch:
        """The architecture that the image is for."""
        return self.header.arch

    def of_type(self, kind: SectionType) -> tuple[Section, ...]:
        """All sections of one type, in file order."""
        return tuple(section for section in self.sections if section.type is kind)

    @property
    def kernel(self) -> Section:
        """The one kernel."""
        return self.of_type(SectionType.KERNEL)[0]

    @property
    def cmdline(self) -> Section:
        """The one command line."""
        return self.of_type(SectionType.CMDLINE)[0]

    @property
    def ramdisks(self) -> tuple[Section, ...]:
        """All ramdisks; at least one."""
        return self.of_type(SectionType.RAMDISK)

    @property
    def is_signed(self) -> bool:
        """Whether there is a signature, good or bad."""
        return bool(self.of_type(SectionType.SIGNATURE))


def read(file: BinaryIO) -> Image:
    """Parse the EIF in a seekable file. Errors: ``EifError``, ``TruncatedError``, ``FileError``."""
    size = file.seek(0, os.SEEK_END)
    header = Header.parse(_read_at(file, 0, Header.LAYOUT.size))
    sections = tuple(_sections(file, header, size))
    _check(header, sections, size)
    return Image(header, sections, size)


def read_section(file: BinaryIO, section: Section, limit: int) -> bytes:
    """All of a small section's data."""
    if section.size > limit:
        raise EifError(
            f"{section.type.name.lower()} section at offset 0x{section.offset:x}: {section.size} bytes, "
            f"expected at most {limit}"
        )
    return _read_at(file, section.offset, section.size)


def read_kernel(file: BinaryIO, image: Image) -> bzimage.Kernel:
    """What the image's kernel says of itself. Errors: ``KernelError``."""
    return bzimage.parse(_read_at(file, image.kernel.offset, min(image.kernel.size, bzimage.HEAD_SIZE)))


def _sections(file: BinaryIO, header: Header, size: int) -> Iterator[Section]:
    for number, (offset, data_size) in enumerate(zip(header.offsets, header.sizes, strict=True)):
        where = f"section {number} at offset 0x{offset:x}"
        if offset < Header.LAYOUT.size:
            raise EifError(f"{where}: inside the header, expected 0x{Header.LAYOUT.size:x} or more")
        found = SectionHeader.parse(_read_at(file, offset, SectionHeader.LAYOUT.size) if offset < size else b"", offset)
        if found.size != data_size:
            raise EifError(f"{where}: got size {found.size} in its header, expected {data_size} as in the table")
        start = offset + SectionHeader.LAYOUT.size
        if data_size > size - start:
            raise TruncatedError(f"{where}: need {data_size} bytes of data, have {size - start}")
        yield Section(found.type, start, data_size)


def _check(header: Header, sections: tuple[Section, ...], size: int) -> None:
    """What must hold between sections."""
    in_order = sorted(sections, key=lambda section: section.offset)
    for before, after in pairwise(in_order):
        if after.offset - SectionHeader.LAYOUT.size < before.end:
            raise EifError(f"section at offset 0x{after.offset - 12:x}: overlaps the one that ends at 0x{before.end:x}")
    kinds = [section.type for section in sections]
    for kind in (SectionType.KERNEL, SectionType.CMDLINE):
        if kinds.count(kind) != 1:
            raise EifError(f"EIF: got {kinds.count(kind)} {kind.name.lower()} sections, expected 1")
    for kind in (SectionType.METADATA, SectionType.SIGNATURE):
        if kinds.count(kind) > 1:
            raise EifError(f"EIF: got {kinds.count(kind)} {kind.name.lower()} sections, expected at most 1")
    if SectionType.RAMDISK not in kinds:
        raise EifError("EIF: got no ramdisk section, expected at least 1")
    if kinds.index(SectionType.RAMDISK) < kinds.index(SectionType.KERNEL):
        raise EifError("EIF: got a ramdisk before the kernel, expected every ramdisk after it")
    if header.version >= METADATA_VERSION and SectionType.METADATA not in kinds:
        raise EifError(f"EIF: got no metadata section, expected one in version {header.version}")
    for section in sections:
        if section.type is SectionType.SIGNATURE and section.size > SIGNATURE_MAX_SIZE:
            raise EifError(f"signature section: got {section.size} bytes, expected at most {SIGNATURE_MAX_SIZE}")
    if in_order[-1].end < size:
        raise EifError(
            f"EIF: {size - in_order[-1].end} bytes after the last section, which ends at 0x{in_order[-1].end:x}"
        )


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    try:
        file.seek(offset)
        return file.read(size)
    except OSError as error:
        raise FileError.of(error, str(getattr(file, "name", "image")), "read") from error
