# SPDX-License-Identifier: Apache-2.0
"""Writing an EIF in one pass: sizes are known before, so the header goes first; measured while it is written."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from enclavekit.codec.bzimage import Arch
from enclavekit.eif.layout import MAX_SECTIONS, VERSION, Header, HeaderFlag, SectionHeader, SectionType
from enclavekit.eif.measure import CHUNK, Measurements, Measuring
from enclavekit.errors import BuildError, FileError

Buffer = bytes | memoryview


class Content(Protocol):
    """A section's data: how much, and then the bytes, as often as asked."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    def chunks(self) -> Iterator[Buffer]:
        """The data, piece by piece; a piece is only good until the next."""


@dataclass(frozen=True, slots=True)
class BytesContent:
    """Data that is at hand."""

    data: bytes

    @property
    def size(self) -> int:
        """Bytes in all."""
        return len(self.data)

    def chunks(self) -> Iterator[Buffer]:
        """In one piece."""
        yield self.data


@dataclass(frozen=True, slots=True)
class FileContent:
    """A whole file, as large as it was when this was made."""

    path: Path
    size: int

    @classmethod
    def of(cls, path: Path) -> FileContent:
        """Take the file's size now; should it change later, writing fails."""
        try:
            return cls(path, path.stat().st_size)
        except OSError as error:
            raise FileError.of(error, path, "read") from error

    def chunks(self) -> Iterator[Buffer]:
        """Read it."""
        try:
            with self.path.open("rb", buffering=0) as file:
                while data := file.read(CHUNK):
                    yield data
        except OSError as error:
            raise FileError.of(error, self.path, "read") from error


@dataclass(frozen=True, slots=True)
class NewSection:
    """A section to be written."""

    type: SectionType
    content: Content


def data_offset(sections: Sequence[NewSection]) -> int:
    """Where the data of a section that follows these would start in the file."""
    return (
        Header.LAYOUT.size
        + sum(SectionHeader.LAYOUT.size + s.content.size for s in sections)
        + SectionHeader.LAYOUT.size
    )


def write(out: BinaryIO, sections: Sequence[NewSection], arch: Arch) -> Measurements:
    """Write an EIF of version 4 to a seekable ``out``, from where it stands. Errors: ``BuildError`` and ``out``'s."""
    if len(sections) > MAX_SECTIONS:
        raise BuildError(f"EIF: {len(sections)} sections, expected at most {MAX_SECTIONS}")
    offsets = tuple(data_offset(sections[:number]) - SectionHeader.LAYOUT.size for number in range(len(sections)))
    sizes = tuple(section.content.size for section in sections)
    flags = HeaderFlag.AARCH64 if arch is Arch.AARCH64 else HeaderFlag(0)
    start = out.tell()
    header = bytes(Header(VERSION, flags, offsets, sizes))
    out.write(header)
    crc = zlib.crc32(header[: Header.CRC_OFFSET])
    measuring = Measuring()
    with ThreadPoolExecutor(2) as pool:
        for number, section in enumerate(sections):
            head = bytes(SectionHeader(section.type, section.content.size))
            out.write(head)
            crc = zlib.crc32(head, crc)
            hashes = measuring.hashes(section.type)
            written = 0
            for chunk in section.content.chunks():
                # The second hash of an application's ramdisk runs beside the first.
                second = pool.submit(hashes[1].update, chunk) if len(hashes) > 1 else None
                if hashes:
                    hashes[0].update(chunk)
                crc = zlib.crc32(chunk, crc)
                out.write(chunk)
                if second is not None:
                    second.result()
                written += len(chunk)
                if written > section.content.size:
                    break
            if written != section.content.size:
                raise BuildError(
                    f"section {number} ({section.type.name.lower()}): got {written} bytes or more, "
                    f"expected {section.content.size}",
                    hint="a file changed while it was read",
                )
    end = out.tell()
    out.seek(start + Header.CRC_OFFSET)
    out.write(crc.to_bytes(4, "big"))
    out.seek(end, os.SEEK_SET)
    return measuring.result()
