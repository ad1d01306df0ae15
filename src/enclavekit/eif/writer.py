# SPDX-License-Identifier: Apache-2.0
"""Writes an EIF in one pass: the sizes are known beforehand, the data are streamed, the CRC is put in at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from enclavekit.eif.content import Content
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
from enclavekit.eif.reader import check_sections
from enclavekit.errors import EifError

DEFAULT_MEM = 1 << 30
DEFAULT_CPUS = 2
"""Both as AWS's tools write them; no one reads them."""


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


def write(out: BinaryIO, sections: Sequence[Section], *, arch: Arch, version: int = VERSION) -> Written:
    """Write the sections in this order to a seekable file that stands at its start.

    The kernel and the command line come before the ramdisks. EifError when the sections make no image; a content that
    is not as long as it said is a ValueError.
    """
    header = plan(sections, arch=arch, version=version)
    with Measurer([section.type for section in sections]) as measurer:
        head = bytes(header)
        measurer.header(head)
        out.write(head)
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
        out.seek(CRC_OFFSET)
        out.write(measurer.crc.to_bytes(4, "big"))
        return Written(measurements, measurer.crc, header.offsets[-1] + SECTION_HEADER_SIZE + header.sizes[-1])


def plan(sections: Sequence[Section], *, arch: Arch, version: int = VERSION) -> Header:
    """The header of the image that ``write`` makes of these sections, its CRC still 0."""
    if len(sections) > MAX_SECTIONS:
        raise EifError(f"EIF sections: {len(sections)}, expected at most {MAX_SECTIONS}")
    check_sections(version, [(section.type, section.content.size) for section in sections])
    offsets, offset = [], HEADER_SIZE
    for section in sections:
        offsets.append(offset)
        offset += SECTION_HEADER_SIZE + section.content.size
    if offset > MAX_OFFSET:
        raise EifError(f"EIF sections: 0x{offset:x} bytes in all, expected at most 0x{MAX_OFFSET:x}")
    return Header(
        version=version,
        flags=FLAG_AARCH64 if arch is Arch.AARCH64 else 0,
        default_mem=DEFAULT_MEM,
        default_cpus=DEFAULT_CPUS,
        offsets=tuple(offsets),
        sizes=tuple(section.content.size for section in sections),
        crc=0,
    )
