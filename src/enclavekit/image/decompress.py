# SPDX-License-Identifier: Apache-2.0
"""Compressed streams as the kernel knows them, unpacked in pieces, with bounds: kernels, and archives in ramdisks.

Source: linux lib/decompress.c for the magics, lib/decompress_unlz4.c for lz4's blocks. zstd needs Python 3.14 or
another package, lz4 another package; lzo cannot be read.
"""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from collections.abc import Collection, Iterator
from importlib import import_module
from typing import Any, Protocol

from enclavekit.eif import CHUNK_SIZE
from enclavekit.errors import FormatError, MissingError, TruncatedError

LZ4_MAGIC = b"\x02\x21\x4c\x18"
MAGICS = {
    # first bytes: compression, as the kernel's configuration calls it
    b"\x1f\x8b": "gzip",
    b"\x1f\x9e": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x5d\0\0": "lzma",
    b"\x28\xb5\x2f\xfd": "zstd",
    LZ4_MAGIC: "lz4",
    b"\x89LZO": "lzo",
}
LONGEST_MAGIC = 6
HISTORY = 1 << 27
"""Of tars, 128 MiB: what zstd --ultra takes; xz -9 takes half of it."""
MAX_STREAMS = 1 << 16

LZ4_BLOCK = 8 << 20
"""What each block becomes, but for the last, which becomes less."""
LZ4_LONGEST = LZ4_BLOCK + LZ4_BLOCK // 255 + 16
"""Bytes of a compressed block that could not be made shorter."""


def compression_of(head: bytes) -> str | None:
    """Which compression a stream's first six bytes tell."""
    return next((kind for magic, kind in MAGICS.items() if head.startswith(magic)), None)


class Decompression:
    """One stream's content, in pieces of at most 256 KiB: iterate once. What follows the stream is left alone.

    ``limit`` bounds the content, ``history`` (a power of two) what a decompressor may remember of it, both in bytes.
    Iterating raises FormatError or TruncatedError; making one MissingError when this Python has nothing for it. At the
    end, ``taken`` is how long the stream was, and ``unused`` what was read behind it.
    """

    def __init__(self, chunks: Iterator[bytes], compression: str, where: str, *, limit: int, history: int) -> None:
        self._chunks = chunks
        self._compression, self._where, self._limit = compression, where, limit
        self._decompressor = _decompressor(compression, where, history)
        self.taken = 0
        self.unused = b""

    def __iter__(self) -> Iterator[bytes]:
        decompressor, what = self._decompressor, f"{self._where}: {self._compression}"
        written = 0
        while not decompressor.eof:
            chunk = b""
            if decompressor.needs_input:
                chunk = next(self._chunks, b"")
                if not chunk and isinstance(decompressor, _Lz4) and decompressor.between_blocks:
                    break
                if not chunk:
                    raise TruncatedError(f"{what} ends before its stream does")
                self.taken += len(chunk)
            try:
                piece = decompressor.decompress(chunk, CHUNK_SIZE)
            except Exception as error:  # each library has a class of its own; our arguments are right
                raise FormatError(f"{self._where}: damaged {self._compression}: {str(error).lower()}") from error
            written += len(piece)
            if written > self._limit:
                raise FormatError(f"{what} becomes more than {self._limit} bytes")
            if piece:
                yield piece
        self.unused = decompressor.unused_data
        self.taken -= len(self.unused)


def decompressed(chunks: Iterator[bytes], where: str, *, compressions: Collection[str], limit: int) -> Iterator[bytes]:
    """What chunks hold: streams one after another, or, when it is none of these compressions, the chunks as they are.

    All chunks are taken; what stands behind the last stream is dropped. Errors are those of ``Decompression``.
    """
    ahead = _Ahead(chunks)
    compression = compression_of(ahead.peek(LONGEST_MAGIC))
    if compression is None or compression not in compressions:
        yield from ahead.chunks()
        return
    for _ in range(MAX_STREAMS):
        unpacking = Decompression(ahead.chunks(), compression, where, limit=limit, history=HISTORY)
        for piece in unpacking:
            limit -= len(piece)
            yield piece
        ahead.push(unpacking.unused)
        if compression_of(ahead.peek(LONGEST_MAGIC)) != compression:
            for _rest in ahead.chunks():
                pass
            return
    raise FormatError(f"{where}: more than {MAX_STREAMS} {compression} streams")


class _Ahead:
    """Chunks, of which some can be looked at first."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._ahead = b""

    def peek(self, size: int) -> bytes:
        while len(self._ahead) < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            self._ahead += chunk
        return self._ahead[:size]

    def push(self, data: bytes) -> None:
        self._ahead = data + self._ahead

    def chunks(self) -> Iterator[bytes]:
        while True:
            chunk, self._ahead = self._ahead or next(self._chunks, b""), b""
            if not chunk:
                return
            yield chunk


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


class _Lz4:
    """The legacy frame, with the interface of the others: a magic, then blocks, each behind its size in 4 bytes.

    Nothing tells its end but a block that becomes less than the others, what is no size, or the end of all.
    """

    def __init__(self, where: str) -> None:
        self._block: Any = _package("lz4.block", "lz4", where)
        self._data = bytearray()
        self._wanted = len(LZ4_MAGIC)
        self._started = False
        self._in_block = False
        self._piece = memoryview(b"")
        self._ends = False
        self.eof = False

    @property
    def between_blocks(self) -> bool:
        return self._started and not self._in_block

    @property
    def needs_input(self) -> bool:
        return not self._piece and len(self._data) < self._wanted

    @property
    def unused_data(self) -> bytes:
        return bytes(self._data)

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        self._data += data
        if not self._piece and len(self._data) >= self._wanted:
            self._next()
        piece, self._piece = self._piece[:max_length], self._piece[max_length:]
        self.eof = self._ends and not self._piece
        return bytes(piece)

    def _next(self) -> None:
        """What was waited for is there: the magic, a size, or a block."""
        if self._in_block:
            content = self._block.decompress(self._take(), uncompressed_size=LZ4_BLOCK)
            self._piece = memoryview(content)
            self._ends = len(content) < LZ4_BLOCK
            self._in_block, self._wanted = False, 4
        elif not self._started:
            if self._take() != LZ4_MAGIC:
                raise ValueError("no magic")
            self._started, self._wanted = True, 4
        elif 0 < (size := int.from_bytes(self._data[:4], "little")) <= LZ4_LONGEST:
            self._take()
            self._in_block, self._wanted = True, size
        else:
            self._ends = True

    def _take(self) -> bytes:
        taken = bytes(self._data[: self._wanted])
        del self._data[: self._wanted]
        return taken


def _decompressor(compression: str, where: str, history: int) -> _Decompressor:
    match compression:
        case "gzip":
            return _Gzip()
        case "bzip2":
            return bz2.BZ2Decompressor()
        case "xz":
            # Besides its history it needs little: this is what liblzma itself adds, rounded up.
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, history + (1 << 20))
        case "lzma":
            return lzma.LZMADecompressor(lzma.FORMAT_ALONE, history + (1 << 20))
        case "zstd":
            return _zstd(where, history)
        case "lz4":
            return _Lz4(where)
    raise MissingError(f"{where}: compressed with {compression}, which cannot be read here")


def _zstd(where: str, history: int) -> _Decompressor:
    zstd = _package("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", "zstd", where)
    options = {zstd.DecompressionParameter.window_log_max: history.bit_length() - 1}
    decompressor: _Decompressor = zstd.ZstdDecompressor(options=options)
    return decompressor


def _package(module: str, compression: str, where: str) -> Any:  # noqa: ANN401 - neither has types
    """One that an extra of ours, called as the compression is, brings."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingError(
            f"{where}: compressed with {compression}, which needs another package",
            hint=f"pip install 'enclavekit[{compression}]'",
        ) from error
