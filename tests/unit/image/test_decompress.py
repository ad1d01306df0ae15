# SPDX-License-Identifier: Apache-2.0
"""Decompression in pieces: every compression, its bounds, and what is wrong with a stream."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator

import pytest

from enclavekit.errors import FormatError, MissingError, TruncatedError
from enclavekit.image.decompress import Decompression, compression_of

DATA = bytes(range(256)) * 10_000
HISTORY = 1 << 25


def alone(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_ALONE)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": alone,
}


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.mark.parametrize("size", [7, 1000, 1 << 18])
@pytest.mark.parametrize("compression", PACKERS)
def test_what_was_compressed_comes_back_in_pieces(compression: str, size: int) -> None:
    packed = PACKERS[compression](DATA)
    assert compression_of(packed[:6]) == compression
    pieces = list(Decompression(chunks(packed + b"rest", size), compression, "x", limit=len(DATA), history=HISTORY))
    assert b"".join(pieces) == DATA
    assert max(map(len, pieces)) <= 1 << 18


def test_zstd_and_its_history() -> None:
    zstd = pytest.importorskip("backports.zstd")
    packed = zstd.compress(DATA, options={zstd.CompressionParameter.window_log: 20})
    assert compression_of(packed) == "zstd"
    assert b"".join(Decompression(iter([packed]), "zstd", "x", limit=len(DATA), history=1 << 22)) == DATA
    with pytest.raises(FormatError, match=r"^x: damaged zstd: .*memory"):
        list(Decompression(iter([packed]), "zstd", "x", limit=len(DATA), history=1 << 19))


@pytest.mark.parametrize("pack", [lzma.compress, alone])
def test_history_bounds_memory(pack: Callable[[bytes], bytes]) -> None:
    packed = pack(DATA)  # 8 MiB of history, by default
    compression = compression_of(packed) or ""
    with pytest.raises(FormatError) as caught:
        list(Decompression(iter([packed]), compression, "x", limit=len(DATA), history=1 << 22))
    assert caught.value.message == f"x: damaged {compression}: memory usage limit exceeded"
    assert list(Decompression(iter([packed]), compression, "x", limit=len(DATA), history=1 << 23))


@pytest.mark.parametrize("compression", PACKERS)
def test_bounds_and_ends(compression: str) -> None:
    packed = PACKERS[compression](DATA)
    with pytest.raises(FormatError) as caught:
        list(Decompression(iter([packed]), compression, "x", limit=len(DATA) - 1, history=HISTORY))
    assert caught.value.message == f"x: {compression} becomes more than {len(DATA) - 1} bytes"
    with pytest.raises(TruncatedError) as cut:
        list(Decompression(iter([packed[:-6]]), compression, "x", limit=len(DATA), history=HISTORY))
    assert cut.value.message == f"x: {compression} ends before its stream does"


def test_what_cannot_be_read() -> None:
    assert compression_of(b"070701") is None
    with pytest.raises(MissingError) as caught:
        list(Decompression(iter(()), "lz4", "x", limit=1, history=1))
    assert caught.value.message == "x: compressed with lz4, which cannot be read here"


def test_zstd_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("enclavekit.image.decompress.import_module", refuse)
    with pytest.raises(MissingError) as caught:
        list(Decompression(iter(()), "zstd", "x", limit=1, history=1))
    assert caught.value.message == "x: compressed with zstd, which needs another package"
    assert caught.value.hint == "pip install 'enclavekit[zstd]'"
