# SPDX-License-Identifier: Apache-2.0
"""Reads a ramdisk back: the archives in it, compressed or not, and the files in those, their data left where they are.

Source: linux init/initramfs.c (unpack_to_rootfs), lib/decompress.c for the magics. A ramdisk is any number of archives,
each a cpio or a compressed cpio, with NULs between them. A plain one must start at a multiple of 4.
"""

from __future__ import annotations

import bz2
import lzma
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from enclavekit.codec import cpio
from enclavekit.eif import CHUNK_SIZE, FileContent, ImageSection
from enclavekit.errors import FileError, FormatError, MissingError, TruncatedError

MAX_FILES = 1 << 20
"""In all archives of a ramdisk."""
MAX_ARCHIVES = 1024
MIN_UNPACKED_SIZE = 48 << 20
MAX_RATIO = 32
"""A compressed archive may become 48 MiB, or 32 times its size: real ones become ten times as large at most."""
XZ_MEMORY = 96 << 20
ZSTD_WINDOW_LOG = 25
"""2 to the power of this many bytes of history: what the kernel itself takes is less (ZSTD_WINDOWSIZE_MAX, 8 MiB)."""

_MAGICS = {
    # first bytes: compression, as the kernel's configuration calls it
    b"\x1f\x8b": "gzip",
    b"\x1f\x9e": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x5d\0\0": "lzma",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x89LZO": "lzo",
}


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


class _Decompressor(Protocol):
    """As bz2, lzma and zstd have it in the standard library."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    """zlib, with the interface of the others."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


@contextmanager
def open_ramdisk(file: BinaryIO, section: ImageSection, *, name: str, scratch: Path | None = None) -> Iterator[Ramdisk]:
    """The ramdisk in a section of an open image.

    Compressed archives are unpacked to unnamed temporary files (in ``scratch``, by default where the system has them),
    which are gone at the end, and with them the contents. Odd bytes are no exception but ``Ramdisk.trouble``: what came
    before them is there, as it would be in the enclave.
    """
    with ExitStack() as files:
        reader = _Reader(file, section, name, scratch, files)
        try:
            reader.read()
        except (FormatError, MissingError) as error:
            reader.ramdisk.trouble = error
        yield reader.ramdisk


class _Reader:
    def __init__(
        self, file: BinaryIO, section: ImageSection, name: str, scratch: Path | None, files: ExitStack
    ) -> None:
        self._file, self._start, self._end = file, section.offset, section.end
        self._name = name
        self._scratch = scratch
        self._temporary = files
        self._room = MAX_FILES
        self.ramdisk = Ramdisk([])

    def read(self) -> None:
        offset = self._start
        while (offset := _skip_nuls(self._file, offset, self._end)) < self._end:
            relative = offset - self._start
            if len(self.ramdisk.archives) == MAX_ARCHIVES:
                raise FormatError(f"ramdisk at offset 0x{relative:x}: more than {MAX_ARCHIVES} archives")
            self._file.seek(offset)
            head = self._file.read(min(6, self._end - offset))
            if head.startswith(b"0") and relative % 4 == 0:
                archive = self._add(Archive(None, relative, 0, 0))
                end = self._read_files(archive, self._file, offset, self._end, base=self._start)
                archive.size = archive.unpacked_size = end - offset
            else:
                compression = next((kind for magic, kind in _MAGICS.items() if head.startswith(magic)), None)
                if compression is None:
                    raise FormatError(
                        f"ramdisk at offset 0x{relative:x}: {head!r},"
                        " expected a plain archive, at a multiple of 4, or a compressed one",
                        hint="the kernel would not unpack it",
                    )
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
            if not self._room:
                raise FormatError(f"ramdisk: more than {MAX_FILES} files")
            self._room -= 1
            content = FileContent(source, member.data_offset, member.entry.size, self._name)
            archive.files.append(RamdiskFile(member.entry, content, member.offset - base))

    def _unpack(self, offset: int, compression: str, out: BinaryIO) -> int:
        """Decompress one stream to ``out``; the bytes that it took."""
        where = f"ramdisk at offset 0x{offset - self._start:x}"
        decompressor = _decompressor(compression, where)
        limit = max(MIN_UNPACKED_SIZE, MAX_RATIO * (self._end - offset))
        chunks = FileContent(self._file, offset, self._end - offset, self._name).chunks()
        taken = written = 0
        while not decompressor.eof:
            chunk = b""
            if decompressor.needs_input:
                chunk = next(chunks, b"")
                if not chunk:
                    raise TruncatedError(f"{where}: {compression} ends before its stream does")
                taken += len(chunk)
            try:
                piece = decompressor.decompress(chunk, CHUNK_SIZE)
            except Exception as error:  # each library has a class of its own; our arguments are right
                raise FormatError(f"{where}: damaged {compression}: {str(error).lower()}") from error
            written += len(piece)
            if written > limit:
                raise FormatError(f"{where}: {compression} becomes more than {limit} bytes, {MAX_RATIO} times its size")
            try:
                out.write(piece)
            except OSError as error:
                raise FileError.of(error, "temporary file", "write") from error
        return taken - len(decompressor.unused_data)


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


def _decompressor(compression: str, where: str) -> _Decompressor:
    match compression:
        case "gzip":
            return _Gzip()
        case "bzip2":
            return bz2.BZ2Decompressor()
        case "xz":
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)
        case "lzma":
            return lzma.LZMADecompressor(lzma.FORMAT_ALONE, XZ_MEMORY)
        case "zstd":
            return _zstd(where)
    raise MissingError(f"{where}: compressed with {compression}, which cannot be read here")


def _zstd(where: str) -> _Decompressor:
    try:
        zstd: Any = import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ImportError as error:
        raise MissingError(
            f"{where}: compressed with zstd, which needs another package", hint="pip install 'enclavekit[zstd]'"
        ) from error
    options = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
    decompressor: _Decompressor = zstd.ZstdDecompressor(options=options)
    return decompressor
