# SPDX-License-Identifier: Apache-2.0
"""Ramdisks read back: plain and compressed archives, one after another, whole and broken."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.codec import cpio
from enclavekit.eif import ImageSection, SectionType
from enclavekit.image.initramfs import Ramdisk, open_ramdisk


def plain(*files: tuple[bytes, bytes]) -> bytes:
    entries = [(cpio.Entry(name, stat.S_IFREG | 0o644, len(data), ino=1), [data]) for name, data in files]
    return b"".join(cpio.archive(entries))


ONE, TWO = plain((b"one", b"1"), (b"dir/two", b"22")), plain((b"three", b"333"))


def opened(directory: Path, data: bytes, check: Callable[[Ramdisk], None]) -> None:
    """The ramdisk in the middle of a file."""
    path = directory / "ramdisk"
    path.write_bytes(bytes(13) + data + b"behind")
    with path.open("rb") as file:
        with open_ramdisk(file, ImageSection(SectionType.RAMDISK, 1, len(data)), name="r", scratch=directory) as found:
            check(found)


def names(ramdisk: Ramdisk) -> list[tuple[bytes, bytes]]:
    return [(one.entry.name, b"".join(one.content.chunks())) for one in ramdisk.files]


def zstd(data: bytes) -> bytes:
    module = import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    packed: bytes = module.compress(data)
    return packed


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "zstd": zstd,
}


def test_plain_archives_one_after_another(tmp_path: Path) -> None:
    def check(found: Ramdisk) -> None:
        assert found.trouble is None
        assert names(found) == [(b"one", b"1"), (b"dir/two", b"22"), (b"three", b"333")]
        assert [(one.compression, one.offset) for one in found.archives] == [(None, 0), (None, len(ONE) + 512)]
        assert next(found.files).offset == 0
        assert [one.offset for one in found.files][2] == len(ONE) + 512

    opened(tmp_path, ONE + bytes(512) + TWO, check)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed(compression: str, tmp_path: Path) -> None:
    """A plain one, a compressed one that holds two, and another after it, with NULs between."""
    packed = COMPRESSIONS[compression](ONE + TWO)

    def check(found: Ramdisk) -> None:
        assert found.trouble is None
        assert [one[0] for one in names(found)] == [
            b"three",
            b"one",
            b"dir/two",
            b"three",
            b"one",
            b"dir/two",
            b"three",
        ]
        assert [one.compression for one in found.archives] == [None, compression, compression]
        middle = found.archives[1]
        assert (middle.offset, middle.size, middle.unpacked_size) == (len(TWO), len(packed), len(ONE + TWO))
        assert found.unpacked_size == len(cpio_only(TWO)) + 2 * len(ONE + TWO)

    opened(tmp_path, TWO + packed + bytes(3) + packed, check)


def cpio_only(data: bytes) -> bytes:
    """Without the padding behind its trailer, but for what its own alignment needs."""
    end = data.index(b"TRAILER!!!") + 11
    return data[: end + -end % 4]


def test_nothing_at_all(tmp_path: Path) -> None:
    for data in (b"", bytes(5000)):
        opened(tmp_path, data, _assert_nothing)


def _read_all(found: Ramdisk) -> None:
    assert len(names(found)) == len(list(found.files))


def _assert_nothing(found: Ramdisk) -> None:
    assert found.archives == []
    assert found.trouble is None


@pytest.mark.parametrize(
    ("data", "message", "readable"),
    [
        (
            b"hello",
            "ramdisk at offset 0x0: b'hello', expected a plain archive, at a multiple of 4, or a compressed one",
            0,
        ),
        (
            cpio_only(TWO) + bytes(1) + ONE,
            f"ramdisk at offset 0x{len(cpio_only(TWO)) + 1:x}: b'070701',"
            " expected a plain archive, at a multiple of 4, or a compressed one",
            1,
        ),
        (ONE[:300], "cpio header at offset 0x101: need 110 bytes, have 56", 2),
        (gzip.compress(ONE, mtime=0)[:-3], "ramdisk at offset 0x0: gzip ends before its stream does", 0),
        (TWO + bz2.compress(ONE)[:50], f"ramdisk at offset 0x{len(TWO):x}: bzip2 ends before its stream does", 1),
        (
            gzip.compress(bytes(49 << 20), mtime=0),
            "ramdisk at offset 0x0: gzip becomes more than 50331648 bytes",
            0,
        ),
        (b"\x02\x21\x4c\x18\x09\0\0\0rest", "ramdisk at offset 0x0: lz4 ends before its stream does", 0),
        (b"\x89LZO\0\r\n", "ramdisk at offset 0x0: compressed with lzo, which cannot be read here", 0),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_trouble_comes_after_what_could_be_read(data: bytes, message: str, readable: int, tmp_path: Path) -> None:
    def check(found: Ramdisk) -> None:
        assert found.trouble is not None
        assert found.trouble.message == message
        assert len(list(found.files)) == readable

    opened(tmp_path, data, check)


def test_damage_within(tmp_path: Path) -> None:
    for name, compress in COMPRESSIONS.items():
        packed = bytearray(compress(ONE * 20))
        packed[len(packed) // 2] ^= 0xFF

        def check(found: Ramdisk, name: str = name) -> None:
            assert found.trouble is not None, name

        opened(tmp_path, bytes(packed), check)


@given(st.binary(max_size=600))
def test_any_bytes_are_read_or_explained(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    for more in (data, ONE + data, b"\x1f\x8b" + data, gzip.compress(data)):
        opened(tmp_path_factory.getbasetemp(), more, _read_all)


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no program cpio")
def test_archives_of_cpio(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "dir").mkdir(parents=True)
    (root / "dir/file").write_bytes(b"content")
    (root / "link").symlink_to("dir/file")
    (root / "hard").hardlink_to(root / "dir/file")
    made = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"],
        cwd=root,
        input=b".\ndir\ndir/file\nlink\nhard\n",
        stdout=subprocess.PIPE,
        check=True,
    ).stdout

    def check(found: Ramdisk) -> None:
        assert found.trouble is None
        entries = {one.entry.name: one for one in found.files}
        assert set(entries) == {b".", b"dir", b"dir/file", b"link", b"hard"}
        assert b"".join(entries[b"link"].content.chunks()) == b"dir/file"
        assert entries[b"hard"].entry.ino == entries[b"dir/file"].entry.ino

    opened(tmp_path, made, check)
