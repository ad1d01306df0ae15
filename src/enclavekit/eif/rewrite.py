# SPDX-License-Identifier: Apache-2.0
"""Signs an image that exists already: its sections are copied as they are, behind headers that are made anew.

So gaps and what lay behind the last section are gone, and sizes agree again; flags and reserved fields are kept. PCR0,
PCR1 and PCR2 stay as they were, because no header is measured.
"""

from __future__ import annotations

import errno
import os
import zlib
from typing import BinaryIO

from enclavekit.eif.content import FileContent
from enclavekit.eif.layout import HEADER_SIZE, SECTION_HEADER_SIZE, SectionHeader, SectionType
from enclavekit.eif.measure import Measured, measure
from enclavekit.eif.reader import Image, ImageSection, check_sections, inspect
from enclavekit.eif.writer import Sign, Written, plan, with_section, write_header
from enclavekit.errors import EifError

_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY)
_MENDED = ("sizes",)
"""Rules that a broken image follows once it is rewritten."""


def measure_to_sign(file: BinaryIO, name: str) -> tuple[Image, Measured]:
    """Read and measure the whole image; EifError when a signature would not make it one that boots."""
    image = inspect(file)
    for remark in image.refusals:
        if remark.rule not in _MENDED:
            raise EifError(f"{remark.message}: such an image does not boot, and is not signed")
    measured = measure(file, image, name=name)
    if image.header.crc not in (measured.crc, measured.sections_crc):
        raise EifError(
            f"the CRC is 0x{measured.crc:08x}, the header says 0x{image.header.crc:08x}: the image is damaged",
            hint="fetch or build it again; a signature would vouch for the damage",
        )
    return image, measured


def write_signed(out: BinaryIO, file: BinaryIO, image: Image, measured: Measured, sign: Sign, *, name: str) -> Written:
    """Write the image to a new file, a new signature its last section and only one; ``name`` is the old file's."""
    kept = [
        (section, crc)
        for section, crc in zip(image.sections, measured.crcs, strict=True)
        if section.type is not SectionType.SIGNATURE
    ]
    header = plan(
        [(SectionType(section.type), section.size) for section, _ in kept],
        arch=image.arch,
        version=image.header.version,
        like=image.header,
    )
    check_sections(header.version, [(section.type, section.size) for section, _ in kept] + [(SectionType.SIGNATURE, 0)])
    size = header.offsets[-1] + SECTION_HEADER_SIZE + header.sizes[-1]
    data = sign(measured.measurements)
    header = with_section(header, SectionType.SIGNATURE, len(data), size)
    out.write(bytes(HEADER_SIZE))
    parts: list[tuple[int, int]] = []
    for section, crc in kept:
        head = bytes(SectionHeader(section.type, section.size, section.flags))
        out.write(head)
        _copy(file, section, out, name)
        parts += [(zlib.crc32(head), len(head)), (crc, section.size)]
    whole = bytes(SectionHeader(SectionType.SIGNATURE, len(data))) + data
    out.write(whole)
    parts.append((zlib.crc32(whole), len(whole)))
    return Written(measured.measurements, write_header(out, header, parts), size + len(whole))


def _copy(file: BinaryIO, section: ImageSection, out: BinaryIO, name: str) -> None:
    """Within the kernel where it can, so that file systems which share blocks do."""
    out.flush()
    position, left = section.offset, section.size
    try:
        while left:
            copied = os.copy_file_range(file.fileno(), out.fileno(), left, position)
            if not copied:
                break  # the file has become shorter: below is the error for it
            position, left = position + copied, left - copied
    except OSError as error:
        if error.errno not in _CANNOT_COPY:
            raise
    out.seek(0, os.SEEK_END)
    for chunk in FileContent(file, position, left, name).chunks():
        out.write(chunk)
