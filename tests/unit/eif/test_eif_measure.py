# SPDX-License-Identifier: Apache-2.0
"""PCRs and CRC of files."""

from __future__ import annotations

import hashlib
import threading
import zlib
from pathlib import Path

import pytest
from eif_images import APPLICATION, BOOT, CMDLINE, KERNEL, PCR0, PCR1, PCR2, PCR2_OF_NOTHING, image, patched, saved

from enclavekit.eif import Arch, FileContent, Measured, digest_file, extend, measure, read
from enclavekit.errors import FileError, TruncatedError


def measured(path: Path, *, section_digests: bool = False) -> Measured:
    with path.open("rb") as file:
        return measure(file, read(file), name="image.eif", section_digests=section_digests)


def extended(data: bytes) -> str:
    """PCR of some content, in the plainest way."""
    return hashlib.sha384(bytes(48) + hashlib.sha384(data).digest()).hexdigest()


@pytest.mark.parametrize(
    ("data", "pcrs"),
    [
        (image(), [PCR0, PCR1, PCR2]),
        (image(arch=Arch.AARCH64), [PCR0, PCR1, PCR2]),
        (image("kc01", version=3), [PCR0, PCR1, PCR2]),
        (image("kcm01s"), [PCR0, PCR1, PCR2]),
        (image("kcm0"), [PCR1, PCR1, PCR2_OF_NOTHING]),
        (
            image("ckm012"),
            [
                extended(CMDLINE + KERNEL + BOOT + APPLICATION + b"more"),
                extended(CMDLINE + KERNEL + BOOT),
                extended(APPLICATION + b"more"),
            ],
        ),
    ],
)
def test_pcrs(tmp_path: Path, data: bytes, pcrs: list[str]) -> None:
    made = measured(saved(tmp_path, data))
    values = made.measurements
    assert [values.pcr0.hex(), values.pcr1.hex(), values.pcr2.hex()] == pcrs
    assert made.crc == int.from_bytes(data[544:548], "big")
    assert made.section_digests is None


def retyped(parts: str, *types: int) -> bytes:
    """An image whose sections say that they are something else: orders that our writer refuses to make."""
    data = image(parts)
    offsets = [int.from_bytes(data[0x1C + 8 * index :][:8], "big") for index in range(len(parts))]
    return patched(data, *[(at, kind.to_bytes(2, "big")) for at, kind in zip(offsets, types, strict=True)])


@pytest.mark.parametrize(
    ("data", "first"),
    [
        (retyped("kmc01", 1, 5, 3, 2, 3), KERNEL + CMDLINE + BOOT),  # kernel, ramdisk, command line, ramdisk
        (retyped("kmc01", 1, 5, 3, 3, 2), KERNEL + CMDLINE + APPLICATION),  # the command line last
    ],
)
def test_late_command_line(tmp_path: Path, data: bytes, first: bytes) -> None:
    values = measured(saved(tmp_path, data)).measurements
    assert values.pcr0.hex() == extended(KERNEL + CMDLINE + BOOT + APPLICATION)
    assert values.pcr1.hex() == extended(first)


def test_section_digests(tmp_path: Path) -> None:
    path = saved(tmp_path, image("kcm012"))
    with path.open("rb") as file:
        sections = read(file).sections
    data = path.read_bytes()
    expected = tuple(hashlib.sha384(data[one.offset : one.end]).digest() for one in sections)
    assert measured(path, section_digests=True).section_digests == expected


def test_both_crcs_of_an_image_with_gaps_and_a_tail(tmp_path: Path) -> None:
    data = image("kcm0")
    moved = data[:943] + b"gap" + data[943:] + b"tail"
    path = saved(tmp_path, patched(moved, (0x1C + 24, (946).to_bytes(8, "big"))))
    parts = [slice(0, 544), slice(548, 943), slice(946, len(moved) - 4)]
    assert measured(path).sections_crc == zlib.crc32(b"".join(path.read_bytes()[part] for part in parts))
    assert measured(path).crc == zlib.crc32(path.read_bytes()[548:], zlib.crc32(path.read_bytes()[:544]))


def test_large_sections_go_through_many_buffers(tmp_path: Path) -> None:
    # Sizes that are no multiple of a buffer's.
    block = bytes(range(256)) * 4099
    path = tmp_path / "file"
    path.write_bytes(block)
    with path.open("rb") as file:
        assert digest_file(file, "file") == hashlib.sha384(block).digest()
        content = FileContent(file, 3, 1_000_003, "file")
        assert b"".join(content.chunks()) == block[3:1_000_006]


def test_file_that_shrinks(tmp_path: Path) -> None:
    path = saved(tmp_path, image())
    threads = threading.active_count()
    with path.open("rb") as file:
        made = read(file)
        path.write_bytes(image()[:1000])
        with pytest.raises(TruncatedError) as caught:
            measure(file, made, name="image.eif")
        assert caught.value.message == "image.eif: ends at offset 0x3e8, expected 0x5bb"
        with pytest.raises(FileError) as unread:
            list(FileContent(file, 990, 20, "image.eif").chunks())
        assert unread.value.message == "cannot read image.eif: it ends at offset 0x3e8, expected 0x3f2"
    assert threading.active_count() == threads


def test_unreadable(tmp_path: Path) -> None:
    path = saved(tmp_path, image())
    with path.open("rb") as good, (tmp_path / "other").open("wb") as closed_to_reading:
        made = read(good)
        with pytest.raises(FileError) as caught:
            measure(closed_to_reading, made, name="image.eif")
        assert caught.value.message == "cannot read image.eif: bad file descriptor"
        with pytest.raises(FileError) as unread:
            list(FileContent(closed_to_reading, 0, 1, "image.eif").chunks())
        assert unread.value.message == "cannot read image.eif: bad file descriptor"


def test_extend_of_nothing() -> None:
    assert extend(hashlib.sha384(b"").digest()).hex() == PCR2_OF_NOTHING
