# SPDX-License-Identifier: Apache-2.0
"""Where the known readers of the format differ, row by row: what the strict one refuses, the tolerant one explains."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from eif_images import PCR0, PCR1, PCR2_OF_NOTHING, image, patched, saved

from enclavekit.eif import Arch, Image, SectionType, examine, inspect, read
from enclavekit.errors import EifError, FormatError

OFFSET_1, SIZE_1 = 0x1C + 8, 0x11C + 8
CMDLINE_AT = 592


def number(value: int) -> bytes:
    return value.to_bytes(8, "big")


GAP = patched(image()[:943] + b"gap" + image()[943:], (0x1C + 24, number(946)), (0x1C + 32, number(1470)))


def renumbered(parts: str, sections: str) -> bytes:
    """An image of ``parts`` whose section types, in order, are made those of ``sections`` (1k 2c 3r 5m, digits)."""
    data = image(parts)
    found = read(io.BytesIO(data)).sections
    return patched(
        data, *((one.header_offset, b"\0" + bytes([int(t)])) for one, t in zip(found, sections, strict=True))
    )


@dataclass(frozen=True)
class Row:
    """``refused`` is the strict reader's message, None when it takes the image; ``rules`` are those of the remarks."""

    data: bytes
    refused: str | None
    rules: tuple[str, ...]
    check: Callable[[Image], bool] = lambda made: len(made.sections) == 5


ROWS = {
    "magic": Row(patched(image(), (0, b".elf")), "EIF header: magic b'.elf', expected b'.eif'", ("magic",)),
    "version 1": Row(patched(image(), (4, b"\0\1")), "EIF header: version 1, expected 2, 3 or 4", ("version", "since")),
    "version 5": Row(patched(image(), (4, b"\0\5")), "EIF header: version 5, expected 2, 3 or 4", ("version",)),
    "table that points elsewhere": Row(
        patched(image(), (OFFSET_1, number(1))),
        "section 1: header at offset 0x1, expected 0x250 or later",
        ("table",),
        lambda made: made.sections[1].header_offset == CMDLINE_AT,
    ),
    "table that points past the end": Row(
        patched(image(), (OFFSET_1, number(1 << 40))),
        "section 1: header at offset 0x10000000000, the file ends at 0xdc7",
        ("table",),
        lambda made: made.sections[1].header_offset == CMDLINE_AT,
    ),
    "no table": Row(patched(image(), (0x1A, b"\0\0")), "EIF header: 0 sections, expected 1 to 32", ("count",)),
    "section flags": Row(
        patched(image(), (CMDLINE_AT + 2, b"\0\1")),
        "section header at offset 0x250: flags 0x0001, expected 0x0000",
        ("section-flags",),
        lambda made: made.sections[1].flags == 1,
    ),
    "header flags: another architecture": Row(
        image(arch=Arch.AARCH64), None, (), lambda made: made.arch is Arch.AARCH64
    ),
    "header flags: unknown": Row(
        patched(image(), (6, b"\x02\x40")), None, ("header-flags",), lambda made: made.header.flags == 0x240
    ),
    "reserved fields": Row(
        patched(image(), (0x18, b"\0\7"), (0x21C, b"\0\0\0\x09")),
        None,
        ("reserved",),
        lambda made: (made.header.reserved, made.header.unused) == (7, 9),
    ),
    "sizes differ, the table is stale": Row(
        patched(image(), (SIZE_1, number(83))),
        "section header at offset 0x250: size 0x54, expected 0x53 as in the EIF header",
        ("sizes",),
        lambda made: made.sections[1].size == 84,
    ),
    "sizes differ, the section is wrong": Row(
        patched(image(), (CMDLINE_AT + 4, number(80))),
        "section header at offset 0x250: size 0x50, expected 0x54 as in the EIF header",
        ("sizes",),
        lambda made: made.sections[1].size == 84,
    ),
    "gap": Row(GAP, None, ("gap",)),
    "type 0": Row(
        patched(image(), (688, b"\0\0")),
        "section header at offset 0x2b0: type 0, expected 1 to 5",
        ("type", "missing"),
        lambda made: made.sections[2].kind == "type-0",
    ),
    "type 6": Row(
        patched(image(), (688, b"\0\6")),
        "section header at offset 0x2b0: type 6, expected 1 to 5",
        ("type", "missing"),
        lambda made: made.sections[2].type == 6,
    ),
    "two kernels": Row(
        renumbered("kcm01", "11535"),
        "EIF sections: 2 of type kernel, expected exactly 1",
        ("duplicate", "missing", "duplicate"),
    ),
    "two command lines": Row(
        renumbered("kcm01", "12532"), "EIF sections: 2 of type cmdline, expected exactly 1", ("duplicate",)
    ),
    "no ramdisk": Row(
        renumbered("kcm0", "1255"),
        "EIF sections: 0 of type ramdisk, expected at least 1",
        ("missing", "duplicate"),
        lambda made: not made.ramdisks,
    ),
    "a ramdisk before the kernel": Row(
        renumbered("kcm01", "32513"),
        "EIF sections: a ramdisk before the kernel, expected all of them after it",
        ("order",),
    ),
    "few trailing bytes": Row(patched(image() + b"more"), None, ("trailing",)),
    "a section's worth of trailing bytes": Row(
        patched(image() + b"\0\3\0\0\0\0\0\0\0\0\0\1x"),
        None,
        ("trailing",),
        lambda made: made.remarks[0].message == "13 bytes behind the last section, which nitro-cli takes for one more",
    ),
    "metadata missing": Row(
        patched(image("kc01", version=3), (4, b"\0\4")),
        "EIF sections: no metadata, which version 4 must have",
        ("missing",),
        lambda made: made.metadata is None,
    ),
    "metadata before its version": Row(
        patched(image(), (4, b"\0\2")),
        "EIF sections: metadata in version 2, expected version 4 or later",
        ("since",),
    ),
    "ends in a section": Row(
        image()[:-100],
        "section 4: ramdisk ends at 0xdc7, the file ends at 0xd63",
        ("truncated",),
        lambda made: made.sections[4].size == 1948,
    ),
    "ends in a section header": Row(
        image()[:1470],
        "section 4: header at offset 0x5bb, the file ends at 0x5be",
        ("table", "trailing"),
        lambda made: len(made.sections) == 4,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_strict(name: str) -> None:
    row = ROWS[name]
    if row.refused is None:
        made = read(io.BytesIO(row.data))
        assert row.check(made)
        assert tuple(remark.rule for remark in made.remarks) == row.rules
        assert made.refusals == ()
    else:
        with pytest.raises(FormatError) as caught:
            read(io.BytesIO(row.data))
        assert caught.value.message == row.refused


@pytest.mark.parametrize("name", ROWS)
def test_tolerant(name: str) -> None:
    row = ROWS[name]
    made = inspect(io.BytesIO(row.data))
    assert tuple(remark.rule for remark in made.remarks) == row.rules
    assert row.check(made)
    assert [remark.message for remark in made.refusals][:1] == ([row.refused] if row.refused else [])


def test_bad_crc(tmp_path: Path) -> None:
    """Told by the tolerant reader, refused by the strict one; neither can tell before all was read."""
    data = image()
    path = saved(tmp_path, data[:544] + b"\0\0\0\0" + data[548:])
    with path.open("rb") as file:
        assert not examine(file, "x").crc_holds
        with pytest.raises(EifError) as caught:
            examine(file, "x", strict=True)
    assert caught.value.message == (
        f"the CRC is 0x{int.from_bytes(data[544:548], 'big'):08x}, the header says 0x00000000: it will not boot"
    )


def test_odd_images_are_measured_as_nitro_cli_does(tmp_path: Path) -> None:
    """In file order, all kernels and command lines, with or without ramdisks."""

    def pcrs(data: bytes) -> tuple[str, str, str]:
        with saved(tmp_path, data).open("rb") as file:
            measured = examine(file, "x").measured.measurements
        return measured.pcr0.hex(), measured.pcr1.hex(), measured.pcr2.hex()

    assert pcrs(ROWS["sizes differ, the table is stale"].data)[:2] == (PCR0, PCR1)
    assert pcrs(GAP)[0] == PCR0
    no_ramdisk = pcrs(ROWS["no ramdisk"].data)
    assert no_ramdisk[0] == no_ramdisk[1]
    assert no_ramdisk[2] == PCR2_OF_NOTHING
    # What was metadata is now a second command line, and is measured as one.
    assert pcrs(renumbered("kcm01", "12233"))[0] != PCR0


def test_what_is_no_image_at_all() -> None:
    for data, message in (
        (b"", "EIF header: need 548 bytes, have 0"),
        (b".eif", "EIF header: need 548 bytes, have 4"),
        (b"\x7fELF" + bytes(2000), "EIF header: magic b'\\x7fELF', expected b'.eif'; no sections were found"),
        (image()[:548], "section 0: header at offset 0x224, the file ends at 0x224; no sections were found"),
    ):
        with pytest.raises(FormatError) as caught:
            inspect(io.BytesIO(data))
        assert caught.value.message == message


def test_properties_of_an_image_that_lacks_parts() -> None:
    made = inspect(io.BytesIO(renumbered("kcm0", "6553")))
    for name in ("kernel", "cmdline"):
        with pytest.raises(EifError) as caught:
            getattr(made, name)
        assert caught.value.message == f"EIF sections: 0 of type {name}, expected exactly 1"
    assert made.ramdisks[0].type is SectionType.RAMDISK
