# SPDX-License-Identifier: Apache-2.0
"""An image that is not in a file: kernel, command line and ramdisks become an EIF straight in enclave memory.

The parent holds no second copy, and no policy goes into the driver: the sections' contents are streamed to where they
will be booted from, measured on the way, and the header with its CRC is written last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO, Self

from enclavekit import __version__
from enclavekit.eif import (
    Arch,
    BuildInfo,
    BytesContent,
    Content,
    FileContent,
    Image,
    Metadata,
    Output,
    Section,
    SectionType,
    Written,
    read_section,
    write,
)
from enclavekit.eif.layout import HEADER_SIZE, SECTION_HEADER_SIZE
from enclavekit.errors import LaunchError
from enclavekit.hypervisor.contract import MemoryRegion


@dataclass(frozen=True)
class Parts:
    """What an EIF is made of. Its metadata, where none are given, only fill up to the page that ramdisk 0 begins on."""

    kernel: Content
    cmdline: bytes
    ramdisks: Sequence[Content]
    metadata: bytes | None = None
    arch: Arch = Arch.X86_64

    @classmethod
    def of_image(cls, file: BinaryIO, image: Image, name: str) -> Self:
        """The parts of an EIF in an open file, left where they are; its signature is left out."""

        def content(offset: int, size: int) -> FileContent:
            return FileContent(file, offset, size, name)

        return cls(
            kernel=content(image.kernel.offset, image.kernel.size),
            cmdline=read_section(file, image.cmdline),
            ramdisks=[content(ramdisk.offset, ramdisk.size) for ramdisk in image.ramdisks],
            metadata=read_section(file, image.metadata) if image.metadata else None,
            arch=image.arch,
        )

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """As they will lie in the image."""
        metadata = self._filler() if self.metadata is None else self.metadata
        return (
            Section(SectionType.KERNEL, self.kernel),
            Section(SectionType.CMDLINE, BytesContent(self.cmdline)),
            Section(SectionType.METADATA, BytesContent(metadata)),
            *(Section(SectionType.RAMDISK, ramdisk) for ramdisk in self.ramdisks),
        )

    @property
    def size(self) -> int:
        """Of the image that they make, in bytes."""
        return HEADER_SIZE + sum(SECTION_HEADER_SIZE + section.content.size for section in self.sections)

    def _filler(self) -> bytes:
        build = BuildInfo("1970-01-01T00:00:00+00:00", "enclavekit", __version__, "Linux", "unknown")
        offset = HEADER_SIZE + 3 * SECTION_HEADER_SIZE + self.kernel.size + len(self.cmdline)
        return Metadata("parts", "1.0", build).encode(offset)

    def write(self, out: Output) -> Written:
        """Assemble the image at ``out``'s beginning. Errors: ``EifError`` for parts that make none, ``FileError``."""
        return write(out, self.sections, arch=self.arch)


def assemble(parts: Parts, regions: Sequence[MemoryRegion], offset: int) -> Written:
    """The image, in enclave memory from ``offset`` on, across regions. Errors: as ``Parts.write``; ``LaunchError``."""
    room = regions[-1].offset + regions[-1].size if regions else 0
    if offset + parts.size > room:
        raise LaunchError(f"memory: need {offset + parts.size} bytes for the image, have {room}")
    return parts.write(RegionWriter(regions, offset))


class RegionWriter:
    """Enclave memory as a file to be written (``eif.Output``): its position 0 is at ``offset`` of the memory."""

    def __init__(self, regions: Sequence[MemoryRegion], offset: int) -> None:
        self._regions = regions
        self._offset = offset
        self._position = 0

    def write(self, data: bytes, /) -> int:
        """All of it, or a ``ValueError`` where the memory ends."""
        view = memoryview(data)
        for region in self._regions:
            start = self._offset + self._position - region.offset
            if view and 0 <= start < region.size:
                count = min(len(view), region.size - start)
                region.buffer[start : start + count] = view[:count]
                view = view[count:]
                self._position += count
        if view:
            raise ValueError(f"{len(view)} bytes past the end of enclave memory")
        return len(data)

    def seek(self, position: int, /) -> int:
        """From the image's beginning."""
        self._position = position
        return position

    def tell(self) -> int:
        """From the image's beginning."""
        return self._position
