# SPDX-License-Identifier: Apache-2.0
"""Decompression in pieces: every compression, its bounds, and what is wrong with a stream."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib import import_module

import pytest

from enclavekit.errors import FormatError, MissingError, TruncatedError
from enclavekit.image.decompress import LZ4_BLOCK, Decompression, compression_of

DATA = bytes(range(256)) * 10_000
HISTORY = 1 << 25


def alone(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_ALONE)


def lz4(data: bytes) -> bytes:
    """The legacy frame, as kernels have it."""
    block = import_module("lz4.block")  # has no types
    blocks = [block.compress(data[at : at + LZ4_BLOCK], store_size=False) for at in range(0, len(data), LZ4_BLOCK)]
    return b"\x02\x21\x4c\x18" + b"".join(len(one).to_bytes(4, "little") + one for one in blocks)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": alone,
    "lz4": lz4,
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


@pytest.mark.parametrize("behind", [b"", b"\0\0\0\x01\x01", b"\0\0\0\0", b"\x02\x21\x4c\x18"])
def test_lz4_ends_behind_whole_blocks(behind: bytes) -> None:
    data = bytes(2 * LZ4_BLOCK)
    packed = lz4(data)
    unpacking = Decompression(chunks(packed + behind, 1000), "lz4", "x", limit=len(data), history=HISTORY)
    assert sum(map(len, unpacking)) == len(data)
    assert (unpacking.taken, unpacking.unused) == (len(packed), behind)


@pytest.mark.skipif(shutil.which("lz4") is None, reason="lz4 is not installed")
@pytest.mark.parametrize("data", [DATA, DATA * 8, b""], ids=["one block", "more", "none"])
def test_what_lz4_makes(data: bytes) -> None:
    packed = subprocess.run(["lz4", "-l", "-9", "-c"], input=data, capture_output=True, check=True).stdout
    assert compression_of(packed) == "lz4"
    assert b"".join(Decompression(iter([packed]), "lz4", "x", limit=len(data), history=HISTORY)) == data


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"\x02\x21\x4c\x18\x02\0\0\0\xff\xff", "x: damaged lz4: decompression failed: corrupt input or insufficient"),
        (b"\x02\x21\x4d\x18", "x: damaged lz4: no magic"),
    ],
)
def test_damaged_lz4(packed: bytes, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        list(Decompression(iter([packed]), "lz4", "x", limit=1, history=HISTORY))
    assert caught.value.message.startswith(message)


def test_what_cannot_be_read() -> None:
    assert compression_of(b"070701") is None
    with pytest.raises(MissingError) as caught:
        list(Decompression(iter(()), "lzo", "x", limit=1, history=1))
    assert caught.value.message == "x: compressed with lzo, which cannot be read here"


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_some_need_a_package(compression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("enclavekit.image.decompress.import_module", refuse)
    with pytest.raises(MissingError) as caught:
        list(Decompression(iter(()), compression, "x", limit=1, history=1))
    assert caught.value.message == f"x: compressed with {compression}, which needs another package"
    assert caught.value.hint == f"pip install 'enclavekit[{compression}]'"
