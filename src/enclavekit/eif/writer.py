# SPDX-License-Identifier: Apache-2.0
"""Writes an EIF in one pass: data are streamed and measured, then signed, and the header is written last."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from enclavekit.eif.content import Content
from enclavekit.eif.crc import combine
from enclavekit.eif.layout import (
    CRC_OFFSET,
    FLAG_AARCH64,
    HEADER_SIZE,
    MAX_OFFSET,
    MAX_SECTIONS,
    SECTION_HEADER_SIZE,
    VERSION,
    Arch,
    Header,
    SectionHeader,
    SectionType,
)
from enclavekit.eif.measure import Measurements, Measurer
from enclavekit.eif.reader import MAX_HELD_SIZES, check_sections
from enclavekit.errors import EifError

DEFAULT_MEM = 1 << 30
DEFAULT_CPUS = 2
"""Both as AWS's tools write them; no one reads them."""


Sign = Callable[[Measurements], bytes]
"""Makes a signature section's data of what it is to sign, once that is known."""


class Output(Protocol):
    """What an image is written to: a file that is open for writing, or anything that does as much."""

    def write(self, data: bytes, /) -> int:
        """Take all of it."""

    def seek(self, position: int, /) -> int:
        """Go on from there."""

    def tell(self) -> int:
        """Where it stands."""


@dataclass(frozen=True, slots=True)
class Section:
    """A section to be written."""

    type: SectionType
    content: Content


@dataclass(frozen=True, slots=True)
class Written:
    """What ``write`` has made. ``size`` in bytes."""

    measurements: Measurements
    crc: int
    size: int


def write(
    out: Output, sections: Sequence[Section], *, arch: Arch, version: int = VERSION, sign: Sign | None = None
) -> Written:
    """Write the sections in this order to a seekable file that stands at its start, and their signature after them.

    The kernel and the command line come before the ramdisks. EifError when the sections make no image; a content that
    is not as long as it said is a ValueError.
    """
    header = plan([(section.type, section.content.size) for section in sections], arch=arch, version=version)
    with Measurer([section.type for section in sections]) as measurer:
        out.write(bytes(header))
        for index, section in enumerate(sections):
            head = bytes(SectionHeader(section.type, section.content.size))
            measurer.header(head)
            out.write(head)
            written = 0
            for chunk in section.content.chunks():
                measurer.data(index, chunk)
                out.write(chunk)
                written += len(chunk)
            if written != section.content.size:
                raise ValueError(f"{section.type} gave {written} bytes, said {section.content.size}")
            measurer.end(index)
        measurements = measurer.measurements()
        body = measurer.crc
    size = out.tell()
    parts = [(body, size - HEADER_SIZE)]
    if sign:
        data = sign(measurements)
        header = with_section(header, SectionType.SIGNATURE, len(data), size)
        whole = bytes(SectionHeader(SectionType.SIGNATURE, len(data))) + data
        out.write(whole)
        parts.append((zlib.crc32(whole), len(whole)))
        size += len(whole)
    return Written(measurements, write_header(out, header, parts), size)


def write_header(out: Output, header: Header, parts: Iterable[tuple[int, int]]) -> int:
    """Write the header with the right CRC, once the CRC and size of each part after it are known; the CRC."""
    head = bytes(header)[:CRC_OFFSET]
    crc = combine([(zlib.crc32(head), CRC_OFFSET), *parts])
    out.seek(0)
    out.write(bytes(replace(header, crc=crc)))
    return crc


def with_section(header: Header, kind: SectionType, size: int, offset: int) -> Header:
    """The header with one more section at its table's end; EifError when there is no room, or it is too large."""
    if len(header.offsets) >= MAX_SECTIONS:
        raise EifError(f"EIF sections: no room for a {kind}, {MAX_SECTIONS} are the most")
    if size > MAX_HELD_SIZES.get(kind, size):
        raise EifError(f"EIF sections: {kind} of {size} bytes, expected at most {MAX_HELD_SIZES[kind]}")
    return replace(header, offsets=(*header.offsets, offset), sizes=(*header.sizes, size))


def plan(
    sections: Sequence[tuple[SectionType, int]], *, arch: Arch, version: int = VERSION, like: Header | None = None
) -> Header:
    """The header of an image of sections of these types and sizes, its CRC still 0.

    All but the table is as in ``like``, where there is one.
    """
    if len(sections) > MAX_SECTIONS:
        raise EifError(f"EIF sections: {len(sections)}, expected at most {MAX_SECTIONS}")
    check_sections(version, sections)
    offsets, offset = [], HEADER_SIZE
    for _, size in sections:
        offsets.append(offset)
        offset += SECTION_HEADER_SIZE + size
    if offset > MAX_OFFSET:
        raise EifError(f"EIF sections: 0x{offset:x} bytes in all, expected at most 0x{MAX_OFFSET:x}")
    flags = FLAG_AARCH64 if arch is Arch.AARCH64 else 0
    made = like or Header(version, flags, DEFAULT_MEM, DEFAULT_CPUS, (), (), 0)
    return replace(made, offsets=tuple(offsets), sizes=tuple(size for _, size in sections), crc=0)
