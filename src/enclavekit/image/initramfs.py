# SPDX-License-Identifier: Apache-2.0
"""Reads a ramdisk back: the archives in it, compressed or not, and the files in those, their data left where they are.

Source: linux init/initramfs.c (unpack_to_rootfs). A ramdisk is any number of archives,
each a cpio or a compressed cpio, with NULs between them. A plain one must start at a multiple of 4.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from enclavekit.codec import cpio
from enclavekit.eif import CHUNK_SIZE, FileContent, ImageSection
from enclavekit.errors import FileError, FormatError, MissingError
from enclavekit.image.decompress import LONGEST_MAGIC, Decompression, compression_of

MAX_FILES = 1 << 20
MIN_FILES = 1 << 16
"""In all archives of a ramdisk: at most one for 64 of its bytes, but 65536 in any case; plain ones cannot have more."""
LONG_NAME = 256
"""So many bytes of a name count as one more file, for all names are in memory at once."""
MAX_ARCHIVES = 1024
MIN_UNPACKED_SIZE = 48 << 20
MAX_RATIO = 32
"""Compressed archives may become 48 MiB together, or 32 times the ramdisk: real ones ten times as large at most."""
HISTORY = 1 << 26
"""What compressed archives may refer back to, 64 MiB: as xz -9 does; of zstd the kernel itself takes less."""


@dataclass(frozen=True, slots=True)
class RamdiskFile:
    """A file of any kind. ``offset`` is its header's: in the ramdisk, or in what a compressed archive becomes."""

    entry: cpio.Entry
    content: FileContent
    offset: int


@dataclass(slots=True)
class Archive:
    """One archive. ``offset`` and ``size`` are those of its bytes in the ramdisk, padding after it not counted.

    ``unpacked_size`` is that of the plain cpio, padding counted.
    """

    compression: str | None
    offset: int
    size: int
    unpacked_size: int
    files: list[RamdiskFile] = field(default_factory=list)


@dataclass(slots=True)
class Ramdisk:
    """All that was understood. ``trouble`` is what stopped the reading, as it would stop a kernel's."""

    archives: list[Archive]
    trouble: FormatError | MissingError | None = None

    @property
    def files(self) -> Iterator[RamdiskFile]:
        """In the order in which the kernel makes them."""
        for archive in self.archives:
            yield from archive.files

    @property
    def unpacked_size(self) -> int:
        """Bytes of all archives once unpacked."""
        return sum(archive.unpacked_size for archive in self.archives)


@contextmanager
def open_ramdisk(
    file: BinaryIO, section: ImageSection, *, name: str, scratch: Path | None = None, compressed: bool = True
) -> Iterator[Ramdisk]:
    """The ramdisk in a section of an open image.

    Compressed archives are unpacked to unnamed temporary files (in ``scratch``, by default where the system has them),
    which are gone at the end, and with them the contents. Odd bytes are no exception but ``Ramdisk.trouble``: what came
    before them is there, as it would be in the enclave. Without ``compressed``, compressed archives are odd bytes too.
    """
    with ExitStack() as files:
        reader = _Reader(file, section, name, scratch, files, compressed=compressed)
        try:
            reader.read()
        except (FormatError, MissingError) as error:
            reader.ramdisk.trouble = error
        yield reader.ramdisk


class _Reader:
    def __init__(
        self,
        file: BinaryIO,
        section: ImageSection,
        name: str,
        scratch: Path | None,
        files: ExitStack,
        *,
        compressed: bool,
    ) -> None:
        self._file, self._start, self._end = file, section.offset, section.end
        self._name = name
        self._scratch = scratch
        self._compressed = compressed
        self._temporary = files
        size = section.size
        self._files_left = min(MAX_FILES, max(MIN_FILES, size // 64))
        self._bytes_left = max(MIN_UNPACKED_SIZE, MAX_RATIO * size)
        self.ramdisk = Ramdisk([])

    def read(self) -> None:
        offset = self._start
        while (offset := _skip_nuls(self._file, offset, self._end)) < self._end:
            relative = offset - self._start
            if len(self.ramdisk.archives) == MAX_ARCHIVES:
                raise FormatError(f"ramdisk at offset 0x{relative:x}: more than {MAX_ARCHIVES} archives")
            self._file.seek(offset)
            head = self._file.read(min(LONGEST_MAGIC, self._end - offset))
            if head.startswith(b"0") and relative % 4 == 0:
                archive = self._add(Archive(None, relative, 0, 0))
                end = self._read_files(archive, self._file, offset, self._end, base=self._start)
                archive.size = archive.unpacked_size = end - offset
            else:
                compression = compression_of(head)
                if compression is None:
                    raise FormatError(
                        f"ramdisk at offset 0x{relative:x}: {head!r},"
                        " expected a plain archive, at a multiple of 4, or a compressed one",
                        hint="the kernel would not unpack it",
                    )
                if not self._compressed:
                    raise FormatError(f"ramdisk at offset 0x{relative:x}: {compression}, expected a plain archive")
                end = self._read_compressed(offset, compression)
            offset = end

    def _add(self, archive: Archive) -> Archive:
        self.ramdisk.archives.append(archive)
        return archive

    def _read_compressed(self, offset: int, compression: str) -> int:
        """All plain archives that come out of a compressed one; where it ends."""
        unpacked = tempfile.TemporaryFile(dir=self._scratch)  # noqa: SIM115 - lives as long as the ramdisk
        self._temporary.enter_context(unpacked)
        size = self._unpack(offset, compression, unpacked)
        archive = self._add(Archive(compression, offset - self._start, size, unpacked.tell()))
        unpacked.flush()
        inner = 0
        while (inner := _skip_nuls(unpacked, inner, archive.unpacked_size)) < archive.unpacked_size:
            inner = self._read_files(archive, unpacked, inner, archive.unpacked_size, base=0)
        return offset + size

    def _read_files(self, archive: Archive, source: BinaryIO, offset: int, end: int, *, base: int) -> int:
        members = cpio.read(source, offset, end)
        while True:
            try:
                member = next(members)
            except StopIteration as stop:
                trailer_end: int = stop.value
                return trailer_end
            self._files_left -= 1 + len(member.entry.name) // LONG_NAME
            if self._files_left < 0:
                raise FormatError(f"ramdisk: more files than its {self._end - self._start} bytes can hold")
            content = FileContent(source, member.data_offset, member.entry.size, self._name)
            archive.files.append(RamdiskFile(member.entry, content, member.offset - base))

    def _unpack(self, offset: int, compression: str, out: BinaryIO) -> int:
        """Decompress one stream to ``out``; the bytes that it took."""
        chunks = FileContent(self._file, offset, self._end - offset, self._name).chunks()
        where = f"ramdisk at offset 0x{offset - self._start:x}"
        unpacking = Decompression(chunks, compression, where, limit=self._bytes_left, history=HISTORY)
        for piece in unpacking:
            self._bytes_left -= len(piece)
            try:
                out.write(piece)
            except OSError as error:
                raise FileError.of(error, "temporary file", "write") from error
        return unpacking.taken


def _skip_nuls(file: BinaryIO, offset: int, end: int) -> int:
    """The offset of the next byte that is none."""
    file.seek(offset)
    while offset < end:
        chunk = file.read(min(CHUNK_SIZE, end - offset))
        if not chunk:
            return end
        rest = chunk.lstrip(b"\0")
        offset += len(chunk) - len(rest)
        if rest:
            break
    return offset
