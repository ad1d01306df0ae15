# SPDX-License-Identifier: Apache-2.0
"""The ROM's loader as an ordinary program under sanitizers (tests/loader/harness.c), against the strict reader.

What the reader refuses the loader refuses, in words; what both take is in memory as it has to be; and whatever the
bytes, nothing outside of image and memory is touched, for then the program would end.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from struct import pack, pack_into, unpack

import pytest
from hostile_images import hostile_images
from hypothesis import given, settings
from hypothesis import strategies as st

from enclavekit.eif import Arch, BytesContent, Image, Section, SectionType, read, write
from enclavekit.errors import Error

HARNESS = Path(__file__).parents[2] / "loader/harness.c"
FLAGS = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
MIB = 1 << 20
LOADER_STACK_TOP, LOADER_STACK_BOTTOM = 0x9000, 0x8000
"""guest/loader/loader.h"""
MEMORY = 12 * MIB
RAMDISKS = (b"first ramdisk ", b"the second", b"\1" * 5000)

pytestmark = pytest.mark.skipif(
    shutil.which("clang") is None and not os.environ.get("CI"), reason="clang is not installed"
)


class Program:
    """Answers one image after the other, as long as nothing goes wrong."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def load(self, image: bytes, memory: int = MEMORY) -> tuple[int, bytes]:
        """The kernel's entry, 0 for none, and what the harness says to it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(pack("<II", memory, len(image)) + image)
        stdin.flush()
        head = stdout.read(8)
        assert len(head) == 8, "a sanitizer ended the loader"
        entry, size = unpack("<II", head)
        return entry, stdout.read(size)

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    made = tmp_path_factory.mktemp("loader") / "loader"
    subprocess.run(["clang", *FLAGS, "-o", made, HARNESS], check=True)
    running = Program(made)
    yield running
    running.close()


def kernel(size: int = 0x900, init_size: int = 0x2000) -> bytes:
    """A setup header and a little behind it."""
    made = bytearray(size)
    made[0x1F1] = 1
    pack_into("<H", made, 0x1FE, 0xAA55)
    made[0x201] = 0x66
    made[0x202:0x206] = b"HdrS"
    pack_into("<H", made, 0x206, 0x20F)
    made[0x211] = made[0x234] = 1
    pack_into("<I", made, 0x22C, 0x7FFFFFFF)
    pack_into("<I", made, 0x230, 0x1000)
    pack_into("<I", made, 0x238, 2047)
    pack_into("<I", made, 0x260, init_size)
    return bytes(made)


def image(*, metadata: int = 100, ramdisks: tuple[bytes, ...] = RAMDISKS, late_metadata: bool = False) -> bytes:
    sections = [
        Section(SectionType.KERNEL, BytesContent(kernel())),
        Section(SectionType.CMDLINE, BytesContent(b"quiet")),
        *(Section(SectionType.RAMDISK, BytesContent(ramdisk)) for ramdisk in ramdisks),
    ]
    sections.insert(3 if late_metadata else 2, Section(SectionType.METADATA, BytesContent(b" " * metadata)))
    out = io.BytesIO()
    write(out, sections, arch=Arch.X86_64)
    return out.getvalue()


def parsed(data: bytes) -> Image | None:
    """By the strict reader."""
    try:
        return read(io.BytesIO(data))
    except Error:
        return None


def assert_laid(data: bytes, made: bytes) -> None:
    found = read(io.BytesIO(data))
    cmdline, _, ramdisks = made[4096:].partition(b"\0")
    assert cmdline == data[found.cmdline.offset :][: found.cmdline.size] + b" suffix"
    at = 0
    for number, section in enumerate(found.ramdisks):
        content = data[section.offset :][: section.size]
        if number and ramdisks[at : at + 12] == bytes(12) and ramdisks[at + 12 :].startswith(content):
            at += 12
        assert ramdisks[at : at + len(content)] == content
        at += len(content)
    assert at == len(ramdisks)
    assert int.from_bytes(made[0x218:0x21C], "little") % 4096 == 0


@pytest.mark.parametrize("metadata", [0, 1, 100, 4096 - 0x300])
@pytest.mark.parametrize("late", [False, True])
def test_a_good_image_is_laid_out(program: Program, metadata: int, late: bool) -> None:
    data = image(metadata=metadata, late_metadata=late)
    entry, made = program.load(data)
    assert entry % 0x1000 == 0
    assert_laid(data, made)


@pytest.mark.parametrize("name", hostile_images())
def test_what_the_strict_reader_refuses_is_refused(program: Program, name: str) -> None:
    data = hostile_images()[name].data
    entry, made = program.load(data)
    if parsed(data) is None:
        assert entry == 0
        assert made.startswith(b"loader: ")


@pytest.mark.parametrize(
    ("size", "taken"), [(12 * MIB, True), (8 * MIB + 0x2000 + 0x2000, True), (8 * MIB + 0x2000 + 0x1FFF, False)]
)
def test_the_kernel_has_its_room_or_is_refused(program: Program, size: int, taken: bool) -> None:
    data = image(ramdisks=(b"x",))
    assert len(data) < 0x1000
    entry, made = program.load(data + bytes(0x2000 - len(data)), size)
    assert (entry != 0) == taken
    assert taken or made.startswith(b"loader: memory end: got 0x00803fff, expected room for the kernel")


GOOD = [image(), image(late_metadata=True), image(ramdisks=(b"only",))]
NUMBERS = st.one_of(
    st.integers(0, 0xFFFF), st.integers(0, (1 << 64) - 1), st.sampled_from([548, 560, 0x900, 1 << 31, 1 << 32, 1 << 63])
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.integers(0, 0x600), st.sampled_from([1, 2, 4, 8]), NUMBERS), max_size=3),
    st.integers(0, 6000),
)
def test_any_image(program: Program, data: bytes, changes: list[tuple[int, int, int]], cut: int) -> None:
    made = bytearray(data[: len(data) - cut // 3] if cut % 2 else data)
    for at, size, number in changes:
        made[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "big")
    entry, answer = program.load(bytes(made))
    if entry == 0:
        assert answer.startswith(b"loader: ")
        assert answer.endswith(b"\r\n")
    else:
        assert parsed(bytes(made)) is not None, "the strict reader refuses it"
        assert_laid(bytes(made), answer)


def test_the_stack_is_large_enough(tmp_path: Path) -> None:
    """All functions' frames together, for none calls itself, and their return addresses: less than there is."""
    flags = ["-target", "i386-unknown-none-elf", "-Os", "-ffreestanding", "-fno-pic", "-mno-sse", "-fstack-usage"]
    source = HARNESS.parents[2] / "guest/loader/loader.c"
    subprocess.run(["clang", *flags, "-c", "-o", tmp_path / "loader.o", source], check=True)
    frames = [line.split("\t") for line in (tmp_path / "loader.su").read_text().splitlines()]
    assert all(kind == "static" for _, _, kind in frames)
    assert 0 < sum(int(size) + 4 for _, size, _ in frames) < LOADER_STACK_TOP - LOADER_STACK_BOTTOM
