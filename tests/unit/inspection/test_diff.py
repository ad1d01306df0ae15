# SPDX-License-Identifier: Apache-2.0
"""What differs between two images, and which PCR it moves; always the same answer with hashes and without."""

from __future__ import annotations

import gzip
import io
import json
import stat
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.cli.main import run_command
from enclavekit.codec import cpio
from enclavekit.eif import Arch, BytesContent, FileContent, Section, SectionType, inspect, write
from enclavekit.inspection.compare import BLOCK_SIZE, different_blocks, same, same_joined, touches
from enclavekit.inspection.diff import Comparison, Opened, compare

Files = Sequence[tuple[cpio.Entry, bytes]]
META: dict[str, Any] = {
    "ImageName": "app",
    "ImageVersion": "1",
    "BuildMetadata": {
        "BuildTime": "1970",
        "BuildTool": "t",
        "BuildToolVersion": "1",
        "OperatingSystem": "Linux",
        "KernelVersion": "6",
    },
    "DockerInfo": None,
    "CustomMetadata": None,
}


def entry(name: bytes, data: bytes = b"", mode: int = stat.S_IFREG | 0o644, ino: int = 1) -> tuple[cpio.Entry, bytes]:
    return cpio.Entry(name, mode, len(data), ino=ino), data


BOOT: Files = [entry(b"init", b"#!init")]
FILES: Files = [
    entry(b"config", b"argv=/bin/app\0env=A=1\0"),
    entry(b"rootfs/big", b"x" * 600_000),
    entry(b"rootfs/bin/app", b"\x7fELF-app"),
    entry(b"rootfs/etc/passwd", b"root:x:0:0::/:/bin/sh\n"),
]
DEFAULT = object()


def archive(files: Files) -> bytes:
    return b"".join(cpio.archive((one, [data] if data else []) for one, data in files))


def image(
    *,
    boot: Files | bytes = BOOT,
    files: Files | bytes | None = FILES,
    kernel: bytes = b"kernel",
    cmdline: bytes = b"console=ttyS0 quiet",
    metadata: dict[str, Any] | bytes = META,
    arch: Arch = Arch.X86_64,
    signature: bytes | None = None,
) -> bytes:
    ramdisks = [one if isinstance(one, bytes) else archive(one) for one in (boot, files) if one is not None]
    sections = [
        Section(SectionType.KERNEL, BytesContent(kernel)),
        Section(SectionType.CMDLINE, BytesContent(cmdline)),
        Section(
            SectionType.METADATA,
            BytesContent(metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()),
        ),
        *(Section(SectionType.RAMDISK, BytesContent(one)) for one in ramdisks),
        *([Section(SectionType.SIGNATURE, BytesContent(signature))] if signature is not None else []),
    ]
    out = io.BytesIO()
    write(out, sections, arch=arch)
    return out.getvalue()


def changed(name: bytes, data: bytes | None = None, **fields: Any) -> Files:
    """The files, one of them with other data or other fields."""
    made = []
    for one, content in FILES:
        if one.name == name:
            content = content if data is None else data  # noqa: PLW2901
            one = replace(one, size=len(content), **fields)  # noqa: PLW2901
        made.append((one, content))
    return made


def compared(tmp_path: Path, one: bytes, other: bytes) -> Comparison:
    """With hashes; that it is the same without is checked here."""
    for name, data in (("one", one), ("other", other)):
        (tmp_path / name).write_bytes(data)
    with (tmp_path / "one").open("rb") as first, (tmp_path / "other").open("rb") as second:
        ours, theirs = Opened(first, inspect(first), "one"), Opened(second, inspect(second), "other")
        with_hashes, without = compare(ours, theirs), compare(ours, theirs, pcrs=False)
    assert with_hashes.differences == without.differences
    assert with_hashes.moved == without.moved
    assert without.measured is None
    return with_hashes


def moved(comparison: Comparison) -> list[str]:
    return [name for name, yes in comparison.moved.items() if yes]


def only_file(comparison: Comparison) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    (difference,) = comparison.differences
    assert difference.where == "ramdisk-1"
    assert difference.pcrs == ("PCR0", "PCR2")
    (file,) = difference.files
    return file.path, file.changes, file.details


def test_the_same(tmp_path: Path) -> None:
    found = compared(tmp_path, image(), image())
    assert found.same
    assert moved(found) == []


@pytest.mark.parametrize(
    ("files", "path", "change", "detail"),
    [
        (changed(b"rootfs/bin/app", b"\x7fELF-app2"), "rootfs/bin/app", "content", "8 bytes, then 9"),
        (changed(b"rootfs/bin/app", b"\x7fELF-APP"), "rootfs/bin/app", "content", "8 bytes, others than before"),
        (changed(b"rootfs/bin/app", mode=stat.S_IFREG | 0o755), "rootfs/bin/app", "mode", "0644, then 0755"),
        (changed(b"rootfs/bin/app", uid=5, gid=6), "rootfs/bin/app", "owner", "0:0, then 5:6"),
        (
            changed(b"rootfs/bin/app", mtime=86400),
            "rootfs/bin/app",
            "mtime",
            "1970-01-01 00:00:00, then 1970-01-02 00:00:00",
        ),
        (changed(b"rootfs/bin/app", nlink=2), "rootfs/bin/app", "links", "1, then 2"),
        (changed(b"rootfs/bin/app", rdev=(1, 3)), "rootfs/bin/app", "device", "0:0, then 1:3"),
        (
            changed(b"rootfs/bin/app", mode=stat.S_IFLNK | 0o644),
            "rootfs/bin/app",
            "type",
            "file, then symlink",
        ),
        (
            changed(b"config", b"argv=/bin/app\0env=A=2\0"),
            "config",
            "content",
            "22 bytes, others than before; without env=A=1; with env=A=2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_thing_of_one_file(files: Files, path: str, change: str, detail: str, tmp_path: Path) -> None:
    found = compared(tmp_path, image(), image(files=files))
    assert moved(found) == ["PCR0", "PCR2"]
    assert only_file(found) == (path, (change,), (f"{change}: {detail}",))


def test_several_things_of_one_file(tmp_path: Path) -> None:
    found = compared(tmp_path, image(), image(files=changed(b"rootfs/big", b"y" * 600_000, mtime=5, uid=1)))
    assert only_file(found)[:2] == ("rootfs/big", ("owner", "mtime", "content"))


def test_a_byte_in_the_middle_of_a_large_file(tmp_path: Path) -> None:
    data = b"x" * 300_000 + b"y" + b"x" * 299_999
    found = compared(tmp_path, image(), image(files=changed(b"rootfs/big", data)))
    assert only_file(found)[:2] == ("rootfs/big", ("content",))


def test_files_behind_one_that_grew_are_not_blamed(tmp_path: Path) -> None:
    found = compared(tmp_path, image(), image(files=changed(b"config", b"argv=/bin/other\0")))
    assert [file.path for file in found.differences[0].files] == ["config"]


def test_added_and_removed(tmp_path: Path) -> None:
    one = [*FILES, entry(b"rootfs/old", b"old")]
    other = [*FILES, entry(b"rootfs/sub", mode=stat.S_IFDIR | 0o755)]
    (difference,) = compared(tmp_path, image(files=one), image(files=other)).differences
    assert [(file.path, file.changes, file.details) for file in difference.files] == [
        ("rootfs/old", ("removed",), ("file, 3 bytes",)),
        ("rootfs/sub", ("added",), ("directory",)),
    ]


@pytest.mark.parametrize(
    ("other", "detail"),
    [
        (
            [FILES[0], FILES[2], FILES[1], FILES[3]],
            "order of files: rootfs/big, then rootfs/bin/app in its place",
        ),
        ([(replace(one, ino=number), data) for number, (one, data) in enumerate(FILES)], "inode numbers"),
        (archive(FILES) + bytes(512), "padding, or how the same headers are written"),
        (archive(FILES)[:102] + b"00000001" + archive(FILES)[110:], "padding, or how the same headers are written"),
    ],
)
def test_order_and_padding(other: Files | bytes, detail: str, tmp_path: Path) -> None:
    found = compared(tmp_path, image(), image(files=other))
    (difference,) = found.differences
    assert difference.details[-1] == detail
    assert difference.files == []
    assert moved(found) == ["PCR0", "PCR2"]


def test_compressed_ramdisks_are_compared_by_file(tmp_path: Path) -> None:
    one = gzip.compress(archive(FILES), 9, mtime=0)
    same_files = compared(tmp_path, image(files=one), image(files=gzip.compress(archive(FILES), 1, mtime=0)))
    assert same_files.differences[0].details[-1] == "how the same files are compressed"
    other = gzip.compress(archive(changed(b"rootfs/bin/app", b"\x7fELF-new")), 9, mtime=0)
    found = compared(tmp_path, image(files=one), image(files=other))
    assert [(file.path, file.changes) for file in found.differences[0].files] == [("rootfs/bin/app", ("content",))]
    (difference,) = compared(tmp_path, image(), image(files=one)).differences
    assert difference.details[-1] == "compression: not compressed; then gzip"
    assert difference.files == []


def test_kernel_and_command_line_and_boot_ramdisk(tmp_path: Path) -> None:
    other = image(kernel=b"KERNEL", cmdline=b"console=ttyS0 debug", boot=[entry(b"init", b"#!INIT")])
    found = compared(tmp_path, image(), other)
    assert [(one.where, one.pcrs, one.details) for one in found.differences] == [
        ("kernel", ("PCR0", "PCR1"), ["content"]),
        ("cmdline", ("PCR0", "PCR1"), ["without quiet", "with debug"]),
        ("ramdisk-0", ("PCR0", "PCR1"), []),
    ]
    assert moved(found) == ["PCR0", "PCR1"]
    spaced = compared(tmp_path, image(), image(cmdline=b"quiet console=ttyS0"))
    assert spaced.differences[0].details == ["the order or spacing of its words"]


def test_what_moves_no_pcr(tmp_path: Path) -> None:
    named = {**META, "ImageName": "other", "BuildMetadata": {**META["BuildMetadata"], "BuildTime": "1971"}}
    found = compared(tmp_path, image(), image(metadata=named, arch=Arch.AARCH64))
    assert moved(found) == []
    assert [(one.where, one.pcrs, one.details) for one in found.differences] == [
        ("header", (), ["flags 0x0, then 0x1"]),
        (
            "metadata",
            (),
            ["218 bytes, then 220", 'ImageName "app", then "other"', 'BuildMetadata.BuildTime "1970", then "1971"'],
        ),
    ]
    padded = json.dumps(META).encode() + b"  "
    assert compared(tmp_path, image(), image(metadata=padded)).differences[0].details == [
        f"{len(padded) - 2} bytes, then {len(padded)}",
        "spacing or order of its JSON",
    ]


def test_a_header_alone(tmp_path: Path) -> None:
    data = image()
    found = compared(tmp_path, data, data[:544] + b"\1\2\3\4" + data[548:])
    (difference,) = found.differences
    assert difference.where == "header"
    assert difference.details == [f"CRC 0x{int.from_bytes(data[544:548], 'big'):08x}, then 0x01020304"]
    unused_slot = data[: 0x1C + 8 * 31] + b"\0\0\0\0\0\0\0\7" + data[0x1C + 8 * 32 :]
    assert compared(tmp_path, data, unused_slot).differences[0].details == ["the table of sections"]


def test_sections_that_one_lacks(tmp_path: Path) -> None:
    found = compared(tmp_path, image(files=None), image())
    assert [(one.where, one.details) for one in found.differences] == [
        ("ramdisk-1", [f"only in other: {len(archive(FILES))} bytes"])
    ]
    assert moved(found) == ["PCR0", "PCR2"]
    found = compared(tmp_path, image(signature=b"?"), image())
    assert [(one.where, one.pcrs) for one in found.differences] == [("signature", ("PCR8",))]
    assert moved(found) == ["PCR8"]


def test_bytes_that_change_section_move_nothing_of_what_covers_both(tmp_path: Path) -> None:
    """PCR0 has no framing: the end of the command line can become the start of the first ramdisk."""
    boot = archive(BOOT)
    found = compared(tmp_path, image(cmdline=b"ab", boot=b"cd" + boot), image(cmdline=b"abc", boot=b"d" + boot))
    assert moved(found) == []
    assert [one.where for one in found.differences] == ["cmdline", "ramdisk-0"]


def test_bytes_behind(tmp_path: Path) -> None:
    found = compared(tmp_path, image(), image() + b"tail")
    assert [(one.where, one.details) for one in found.differences] == [
        ("padding", ["0 bytes between or behind sections, then 4"])
    ]


@given(st.lists(st.integers(0, 5 * BLOCK_SIZE - 1), max_size=4), st.integers(4 * BLOCK_SIZE, 5 * BLOCK_SIZE))
def test_blocks(tmp_path_factory: pytest.TempPathFactory, places: list[int], size: int) -> None:
    directory = tmp_path_factory.getbasetemp()
    one, other = bytearray(size), bytearray(size)
    for place in places:
        if place < size:
            other[place] = 1
    (directory / "one").write_bytes(one)
    (directory / "other").write_bytes(other)
    with (directory / "one").open("rb") as first, (directory / "other").open("rb") as second:
        ours, theirs = FileContent(first, 0, size, "one"), FileContent(second, 0, size, "other")
        blocks = different_blocks(ours, theirs)
        assert same(ours, theirs) == (not blocks)
    inside = {place for place in places if place < size}
    assert blocks == sorted({place // BLOCK_SIZE for place in inside})
    for place in inside:
        assert touches(blocks, place, place + 1)
    assert not touches(blocks, 7, 7)


@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=4), st.lists(st.integers(0, 40), max_size=4))
def test_joined(data: bytes, ones: list[int], others: list[int]) -> None:
    def cut(places: list[int]) -> list[Any]:
        edges = [0, *sorted(min(place, len(data)) for place in places), len(data)]
        return [BytesContent(data[a:b]) for a, b in pairwise(edges)]

    assert same_joined(cut(ones), cut(others))
    assert not same_joined(cut(ones), [*cut(others), BytesContent(b"x")])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.eif").write_bytes(image())
    Path("b.eif").write_bytes(image(files=changed(b"rootfs/bin/app", b"\x7fELF-new", mode=stat.S_IFREG | 0o755)))
    assert run_command(["diff", "a.eif", "a.eif"]) == 0
    assert capsys.readouterr().out == "the same, byte for byte\n"
    assert run_command(["diff", "a.eif", "b.eif"]) == 1
    assert capsys.readouterr().out == (
        "ramdisk-1  moves PCR0, PCR2\n"
        "  rootfs/bin/app  mode, content\n"
        "    mode: 0644, then 0755\n"
        "    content: 8 bytes, others than before\n"
        "moved: PCR0, PCR2; the same: PCR1, PCR8\n"
    )
    assert run_command(["diff", "a.eif", "b.eif", "--json", "--no-pcrs"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1,
        "Same": False,
        "PCRs": {"PCR0": {"Moved": True}, "PCR1": {"Moved": False}, "PCR2": {"Moved": True}, "PCR8": {"Moved": False}},
        "Differences": [
            {
                "Where": "ramdisk-1",
                "PCRs": ["PCR0", "PCR2"],
                "Details": [],
                "Files": [
                    {
                        "Path": "rootfs/bin/app",
                        "Changes": ["mode", "content"],
                        "Details": ["mode: 0644, then 0755", "content: 8 bytes, others than before"],
                    }
                ],
            }
        ],
    }
    for words in (["diff", "a.eif", "none"], ["diff", "a.eif"], ["diff", "a.eif", "b.eif", "--nonsense"]):
        assert run_command(words) == 2
    Path("junk").write_bytes(b"junk" * 1000)
    capsys.readouterr()
    assert run_command(["diff", "a.eif", "junk"]) == 2
    assert capsys.readouterr().err.startswith("enclave: junk: EIF header: magic b'junk'")
