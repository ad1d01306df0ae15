# SPDX-License-Identifier: Apache-2.0
"""Reading an image's structure, and refusing what is none."""

from __future__ import annotations

import io

import pytest
from eif_images import APPLICATION, BOOT, CMDLINE, KERNEL, METADATA, image, patched
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.eif import Arch, Header, SectionHeader, SectionType, read, read_section
from enclavekit.errors import EifError, FormatError, TruncatedError


def refusal(data: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        read(io.BytesIO(data))
    return caught.value


def test_structure() -> None:
    data = image("kcm01s")
    made = read(io.BytesIO(data))
    assert made.size == len(data)
    assert made.arch is Arch.X86_64
    assert str(made.arch) == "x86_64"
    assert [section.header_offset for section in made.sections] == [548, 592, 688, 943, 1467, 3527]
    assert [section.size for section in made.sections] == [32, 84, 243, 512, 2048, 9]
    assert made.kernel is made.sections[0]
    assert made.cmdline is made.sections[1]
    assert made.metadata is made.sections[2]
    assert made.ramdisks == made.sections[3:5]
    assert made.signature is made.sections[5]
    assert [data[one.offset : one.end] for one in made.sections[:5]] == [KERNEL, CMDLINE, METADATA, BOOT, APPLICATION]


@pytest.mark.parametrize("version", [2, 3])
def test_old_versions(version: int) -> None:
    made = read(io.BytesIO(image("kc01", version=version, arch=Arch.AARCH64)))
    assert made.header.version == version
    assert made.arch is Arch.AARCH64
    assert made.metadata is None
    assert made.signature is None


def test_held_sections() -> None:
    file = io.BytesIO(image())
    made = read(file)
    assert read_section(file, made.cmdline) == CMDLINE
    file.truncate(made.cmdline.offset + 3)
    with pytest.raises(TruncatedError) as caught:
        read_section(file, made.cmdline)
    assert caught.value.message == "cmdline at offset 0x25c: need 84 bytes, have 3"
    with pytest.raises(ValueError, match="a kernel is not to be held in memory"):
        read_section(file, made.kernel)


def test_unknown_flags_are_kept() -> None:
    header = read(io.BytesIO(patched(image(), (6, b"\x02\x41")))).header
    assert header.flags == 0x241
    assert header.arch is Arch.AARCH64
    assert bytes(header) == patched(image(), (6, b"\x02\x41"))[:548]


def test_gaps_and_trailing_bytes_are_read() -> None:
    data = image("kcm0")
    moved = data[:943] + b"gap" + data[943:] + b"tail"
    made = read(io.BytesIO(patched(moved, (0x1C + 24, (946).to_bytes(8, "big")))))
    assert made.ramdisks[0].header_offset == 946
    assert made.size == len(moved)


OFFSET_1, SIZE_1 = 0x1C + 8, 0x11C + 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, b".elf"), "EIF header: magic b'.elf', expected b'.eif'"),
        ((4, b"\0\1"), "EIF header: version 1, expected 2, 3 or 4"),
        ((4, b"\0\5"), "EIF header: version 5, expected 2, 3 or 4"),
        ((0x1A, b"\0\0"), "EIF header: 0 sections, expected 1 to 32"),
        ((0x1A, b"\0\x21"), "EIF header: 33 sections, expected 1 to 32"),
        ((OFFSET_1, b"\0\0\0\0\0\0\2\x24"), "section 1: header at offset 0x224, expected 0x250 or later"),
        ((OFFSET_1, b"\xff" * 8), "section 1: header at offset 0xffffffffffffffff, the file ends at 0xdc7"),
        ((SIZE_1, bytes(8)), "section header at offset 0x250: size 0x54, expected 0x0 as in the EIF header"),
        ((592, b"\0\0"), "section header at offset 0x250: type 0, expected 1 to 5"),
        ((592, b"\0\6"), "section header at offset 0x250: type 6, expected 1 to 5"),
        ((592, b"\0\2\0\1"), "section header at offset 0x250: flags 0x0001, expected 0x0000"),
        ((592, b"\0\1"), "EIF sections: 2 of type kernel, expected exactly 1"),
    ],
)
def test_one_wrong_field(change: tuple[int, bytes], message: str) -> None:
    assert refusal(patched(image(), change)).message == message


def test_section_past_the_end() -> None:
    size = (1 << 40).to_bytes(8, "big")
    error = refusal(patched(image(), (SIZE_1, size), (592 + 4, size)))
    assert isinstance(error, TruncatedError)
    assert error.message == "section 1: cmdline ends at 0x1000000025c, the file ends at 0xdc7"


def test_not_an_image_comes_with_a_hint() -> None:
    error = refusal(b"\x7fELF" + bytes(1000))
    assert isinstance(error, EifError)
    assert error.hint == "this is not an enclave image"
    assert refusal(b"").message == "EIF header: magic b'', expected b'.eif'"


def test_truncated_anywhere() -> None:
    data = image("kcm0")
    for size in range(1, len(data)):
        assert isinstance(refusal(data[:size]), TruncatedError), size
    assert refusal(data[:100]).message == "EIF header: need 548 bytes, have 100"


def test_parts_are_their_own_inverses() -> None:
    data = image()
    assert bytes(Header.parse(data[:548])) == data[:548]
    assert bytes(SectionHeader.parse(data[548:560], 548)) == data[548:560]
    with pytest.raises(TruncatedError) as caught:
        SectionHeader.parse(b"\0\1", 0x224)
    assert caught.value.message == "section header at offset 0x224: need 12 bytes, have 2"
    with pytest.raises(ValueError, match="1 offsets and 2 sizes"):
        bytes(Header(4, 0, 0, 0, (1,), (1, 2), 0))


@given(
    st.binary(max_size=700), st.lists(st.tuples(st.integers(0, 1500), st.binary(min_size=1, max_size=8)), max_size=4)
)
def test_any_bytes_are_read_or_refused(junk: bytes, changes: list[tuple[int, bytes]]) -> None:
    for data in (junk, b".eif\0\4" + junk, patched(image("kcm0"), *changes)):
        try:
            made = read(io.BytesIO(data))
        except FormatError as error:
            assert error.message  # noqa: PT017  # either outcome is right
        else:
            assert 3 <= len(made.sections) <= 32
            assert made.sections[-1].end <= len(data)
            assert made.kernel.type is SectionType.KERNEL
