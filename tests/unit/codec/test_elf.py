# SPDX-License-Identifier: Apache-2.0
"""ELF files: real ones against readelf, hand-made ones of every class and byte order, and hostile ones."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from struct import pack

import pytest
from elf_files import elf_file
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.codec.elf import Elf, ElfType, ReadAt
from enclavekit.errors import FormatError, TruncatedError


def reader(data: bytes) -> ReadAt:
    return lambda offset, size: data[offset : offset + size]


def parse(data: bytes) -> Elf:
    return Elf.parse(reader(data))


REAL = [
    path
    for path in (
        Path("/bin/true"),
        Path("/bin/sh"),
        Path(sys.executable).resolve(),
        *sorted(Path("/usr/lib/x86_64-linux-gnu").glob("lib[cms]*.so.*"))[:20],
        *sorted(Path(sys.prefix, "lib").glob("python3*/site-packages/**/*.so"))[:20],
    )
    if path.is_file()
]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_files_are_as_readelf_says(path: Path) -> None:
    told = subprocess.run(
        ["readelf", "--file-header", "--program-headers", "--dynamic", "--wide", path],
        capture_output=True,
        text=True,
        check=True,
        env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
    ).stdout
    elf = parse(path.read_bytes())
    assert [f"ELF{elf.bits}"] == re.findall(r"Class: +(\S+)", told)
    assert [ElfType(elf.type)] == [ElfType[one] for one in re.findall(r"Type: +(\w+) \(", told)]
    assert {"x86_64": "X86-64", "aarch64": "AArch64"}.get(elf.machine_name, "?") in told
    assert [one.decode() for one in elf.needed] == re.findall(r"\(NEEDED\).*\[(.*)\]", told)
    for value, tag in ((elf.rpath, "RPATH"), (elf.runpath, "RUNPATH")):
        assert ([] if value is None else [value.decode()]) == re.findall(rf"\({tag}\).*\[(.*)\]", told)
    wanted = re.findall(r"program interpreter: (.*)\]", told)
    assert ([] if elf.interpreter is None else [elf.interpreter.decode()]) == wanted
    assert elf.dynamic == (" DYNAMIC " in told)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_class_and_byte_order(bits: int, order: str) -> None:
    data = elf_file(
        bits=bits, order=order, machine=183, kind=3, interpreter=b"/lib/ld.so", needed=[b"a.so", b"b"], runpath=b"/x:/y"
    )
    assert parse(data) == Elf(
        bits=bits,
        little_endian=order == "<",
        type=3,
        machine=183,
        dynamic=True,
        interpreter=b"/lib/ld.so",
        needed=(b"a.so", b"b"),
        runpath=b"/x:/y",
    )
    assert parse(elf_file(bits=bits, order=order, rpath=b"/r")).rpath == b"/r"


def test_a_static_program_asks_for_nothing() -> None:
    assert parse(elf_file()) == Elf(bits=64, little_endian=True, type=2, machine=62, dynamic=False)


@pytest.mark.parametrize(("machine", "name"), [(62, "x86_64"), (183, "aarch64"), (3, "i386"), (2, "machine 2")])
def test_machines_have_names(machine: int, name: str) -> None:
    assert parse(elf_file(machine=machine)).machine_name == name


def changed(data: bytes, offset: int, change: bytes) -> bytes:
    return data[:offset] + change + data[offset + len(change) :]


# The headers of a file with an interpreter and libraries: PT_LOAD, PT_INTERP, PT_DYNAMIC from 64 on, 56 bytes each.
DYNAMIC = elf_file(interpreter=b"/lib/ld.so", needed=[b"a.so"])
STRINGS = 64 + 3 * 56 + len(b"/lib/ld.so\0")
TABLE = STRINGS + len(b"\0a.so\0")
"""NEEDED, STRTAB, STRSZ, NULL: 16 bytes each."""


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", FormatError, "ELF header: magic b'', expected b'\\x7fELF'"),
        (b"\x7fELF\x02", TruncatedError, "ELF header: need 16 bytes, have 5"),
        (changed(DYNAMIC, 4, b"\x03"), FormatError, "ELF header: class 3, expected 1 (32 bits) or 2 (64 bits)"),
        (
            changed(DYNAMIC, 5, b"\x00"),
            FormatError,
            "ELF header: byte order 0, expected 1 (little-endian) or 2 (big-endian)",
        ),
        (DYNAMIC[:40], TruncatedError, "ELF header at offset 0x10: need 48 bytes, have 24"),
        (changed(DYNAMIC, 0x36, b"\x20"), FormatError, "ELF header: program headers of 32 bytes, expected 56"),
        (
            changed(DYNAMIC, 0x38, b"\xff\xff"),
            FormatError,
            "ELF header: 65535 program headers, expected at most 1170",
        ),
        (
            changed(DYNAMIC, 0x20, pack("<Q", 2**64 - 8)),
            TruncatedError,
            "ELF program headers at offset 0xfffffffffffffff8: need 168 bytes, have 0",
        ),
        (
            changed(DYNAMIC, 64 + 56 + 32, pack("<Q", 4097)),
            FormatError,
            "ELF interpreter: path of 4097 bytes, expected 2 to 4096",
        ),
        (
            changed(DYNAMIC, 64 + 56 + 32, pack("<Q", 4)),
            FormatError,
            "ELF interpreter: path does not end with a NUL",
        ),
        (
            changed(DYNAMIC, 64 + 112 + 32, pack("<Q", 1 << 40)),
            FormatError,
            "ELF dynamic section: 1099511627776 bytes, expected at most 1048576",
        ),
        (
            changed(DYNAMIC, TABLE + 16, pack("<Q", 99)),
            FormatError,
            "ELF dynamic section: names of libraries, and no table of strings",
        ),
        (
            changed(DYNAMIC, TABLE + 24, pack("<Q", 5)),
            FormatError,
            "ELF dynamic section: table of strings at address 0x5, which no segment holds",
        ),
        (
            changed(DYNAMIC, TABLE + 8, pack("<Q", 6)),
            FormatError,
            "ELF dynamic section: string at 0x6 of a table of 0x6 bytes",
        ),
        (
            changed(DYNAMIC, TABLE - 1, b"x"),
            FormatError,
            "ELF dynamic section: string at 0x1 has no NUL within 5 bytes",
        ),
    ],
)
def test_broken_files(data: bytes, error: type[FormatError], message: str) -> None:
    with pytest.raises(error) as caught:
        parse(data)
    assert type(caught.value) is error
    assert caught.value.message == message


def test_too_many_libraries() -> None:
    with pytest.raises(FormatError) as caught:
        parse(elf_file(needed=[b"a"] * 1025))
    assert caught.value.message == "ELF dynamic section: 1025 libraries, expected at most 1024"


def test_what_stands_after_the_end_of_the_dynamic_section_does_not_count() -> None:
    elf = parse(changed(DYNAMIC, TABLE, bytes(16)))
    assert elf.dynamic
    assert elf.needed == ()


@given(st.binary(max_size=400))
def test_any_bytes_parse_or_raise(data: bytes) -> None:
    for one in (data, b"\x7fELF\x02\x01\x01" + data, b"\x7fELF\x01\x02\x01" + data):
        with suppress(FormatError):
            assert parse(one).bits in (32, 64)


@given(st.integers(0, len(DYNAMIC) - 1), st.binary(min_size=1, max_size=8))
def test_any_change_parses_or_raises(offset: int, change: bytes) -> None:
    with suppress(FormatError):
        assert parse(changed(DYNAMIC, offset, change)).bits in (32, 64)
