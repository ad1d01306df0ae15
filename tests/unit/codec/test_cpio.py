# SPDX-License-Identifier: Apache-2.0
"""cpio archives against a known archive, against Debian's cpio, and against hostile bytes."""

from __future__ import annotations

import hashlib
import io
import shutil
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.codec import cpio
from enclavekit.errors import FormatError, TruncatedError

DIRECTORY = stat.S_IFDIR | 0o755
FILE = stat.S_IFREG | 0o755
LINK = stat.S_IFLNK | 0o777

Items = list[tuple[cpio.Entry, list[bytes]]]


def join(items: Iterable[tuple[cpio.Entry, list[bytes]]]) -> bytes:
    return b"".join(cpio.archive(items))


def sample() -> Items:
    return [
        (cpio.Entry(b"d", DIRECTORY, ino=1, nlink=2), []),
        (cpio.Entry(b"d/a", FILE, ino=2, nlink=2), []),
        (cpio.Entry(b"d/b", FILE, ino=2, nlink=2, size=5, mtime=7), [b"he", b"llo"]),
        (cpio.Entry(b"d/c", LINK, ino=3, size=1), [b"a"]),
        (cpio.Entry(b"null", stat.S_IFCHR | 0o666, ino=4, rdev=(1, 3)), []),
    ]


def test_known_archive_of_another_writer() -> None:
    # The boot ramdisk of the EIF test vectors, as linuxkit's Go writer numbers it; only its trailer is numbered too.
    fixed = 1492533000
    made = b""
    files = [(b"dev", DIRECTORY, b""), (b"init", FILE, b"#!init\n"), (b"nsm.ko", FILE, b"\x7fELF-nsm")]
    for ino, (name, mode, data) in enumerate([*files, (b"TRAILER!!!", 0, b"")], 721):
        nlink = 2 if mode == DIRECTORY else 1
        mtime = fixed if mode else 0
        made += bytes(cpio.Entry(name, mode, len(data), ino, nlink=nlink, mtime=mtime, dev=(3, 1)))
        made += data + bytes(-len(data) % 4)
    made += bytes(-len(made) % 512)
    assert hashlib.sha256(made).hexdigest() == "e48bc38a47458e241879a6f6b8d0fa00c6c8afd417b48a3f4f623fbdfdc2ebc5"
    assert [member.entry.name for member in cpio.read(io.BytesIO(made))] == [b"dev", b"init", b"nsm.ko"]


def test_size_is_known_and_blocks_are_full() -> None:
    items = sample()
    made = join(items)
    assert len(made) == cpio.archive_size(entry for entry, _ in items)
    assert len(made) % 512 == 0


def test_reading_gives_the_entries_and_where_their_data_are() -> None:
    made = join(sample())
    members = list(cpio.read(io.BytesIO(b"before" + made), 6))
    assert [member.entry for member in members] == [entry for entry, _ in sample()]
    assert made[members[2].data_offset - 6 :][:5] == b"hello"


def test_debian_cpio_unpacks_it(tmp_path: Path) -> None:
    program = shutil.which("cpio")
    if program is None:
        pytest.skip("no program cpio")
    made = join([item for item in sample() if item[0].name != b"null"])
    done = subprocess.run([program, "-idm"], input=made, cwd=tmp_path, capture_output=True, check=True)
    assert done.stderr == b"2 blocks\n"
    assert (tmp_path / "d/a").read_bytes() == b"hello"
    assert (tmp_path / "d/a").samefile(tmp_path / "d/b")
    assert (tmp_path / "d/b").stat().st_mtime == 7
    assert (tmp_path / "d/c").readlink() == Path("a")


def test_reads_what_debian_cpio_packs(tmp_path: Path) -> None:
    program = shutil.which("cpio")
    if program is None:
        pytest.skip("no program cpio")
    (tmp_path / "file").write_bytes(b"content")
    done = subprocess.run([program, "-o", "-Hnewc"], input=b"file\n", cwd=tmp_path, capture_output=True, check=True)
    (member,) = cpio.read(io.BytesIO(done.stdout))
    assert member.entry.name == b"file"
    assert done.stdout[member.data_offset :][: member.entry.size] == b"content"


@pytest.mark.parametrize("data", [[b"four"], [b"fiveandmore"], []])
def test_data_of_another_length_are_the_callers_mistake(data: list[bytes]) -> None:
    with pytest.raises(ValueError, match="data of b'f' are not 5 bytes long"):
        join([(cpio.Entry(b"f", FILE, 5), data)])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (cpio.Entry(b"", FILE), "cpio entry '': name of 0 bytes, expected 1 to 4095 without NUL"),
        (cpio.Entry(b"a\0b", FILE), "cpio entry 'a\\x00b': name of 3 bytes, expected 1 to 4095 without NUL"),
        (
            cpio.Entry(b"n" * 4096, FILE),
            f"cpio entry '{'n' * 64}': name of 4096 bytes, expected 1 to 4095 without NUL",
        ),
        (cpio.Entry(b"f", FILE, 1 << 32), "cpio entry f: 4294967296 bytes, at most 4294967295 fit in this format"),
        (
            cpio.Entry(b"f", FILE, uid=-1),
            "cpio entry f: a number in (0, 33261, -1, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0) does not fit in 32 bits",
        ),
    ],
)
def test_what_does_not_fit_is_refused(entry: cpio.Entry, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        bytes(entry)
    assert caught.value.message == message


def test_too_large_file_comes_with_a_hint() -> None:
    with pytest.raises(FormatError) as caught:
        bytes(cpio.Entry(b"f", FILE, 1 << 32))
    assert caught.value.hint == "split the file, or bring it into the enclave over vsock"


def broken(made: bytes) -> list[tuple[bytes, str]]:
    return [
        (b"", "cpio header at offset 0x0: need 110 bytes, have 0"),
        (made[:50], "cpio header at offset 0x0: need 110 bytes, have 50"),
        (b"070702" + made[6:], "cpio entry at offset 0x0: magic b'070702', expected b'070701'"),
        (made[:8] + b"_" + made[9:], "cpio entry at offset 0x0: header is not all hexadecimal digits"),
        (made[:94] + b"00000000" + made[102:], "cpio entry at offset 0x0: name of 0 bytes, expected 2 to 4096"),
        (made[:94] + b"00001001" + made[102:], "cpio entry at offset 0x0: name of 4097 bytes, expected 2 to 4096"),
        (made[:94] + b"00000004" + made[102:], "cpio entry at offset 0x0: name does not end at its NUL"),
        (made[:111], "cpio name at offset 0x6e: need 5 bytes, have 1"),
        (made[:118], "cpio data at offset 0x74: need 5 bytes, have 2"),
        (made[:125], "cpio header at offset 0x7c: need 110 bytes, have 1"),
    ]


@pytest.mark.parametrize("index", range(10))
def test_broken_archives(index: int) -> None:
    data, message = broken(join([(cpio.Entry(b"file", FILE, 5), [b"hello"])]))[index]
    with pytest.raises(FormatError) as caught:
        list(cpio.read(io.BytesIO(data)))
    assert caught.value.message == message
    assert isinstance(caught.value, TruncatedError) == ("need" in message)


@given(st.binary(max_size=600), st.integers(0, 700))
def test_any_bytes_are_read_or_refused(junk: bytes, position: int) -> None:
    made = join(sample())
    for data in (junk, made[:position] + junk + made[position:], made[:position]):
        try:
            assert len(list(cpio.read(io.BytesIO(data)))) <= len(data)
        except FormatError as error:
            assert "cpio" in error.message  # noqa: PT017  # either outcome is right


names = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name and name != cpio.TRAILER)
numbers = st.integers(0, 0xFFFFFFFF)


@given(st.lists(st.tuples(names, numbers, numbers, numbers, st.binary(max_size=40))))
def test_round_trip(files: list[tuple[bytes, int, int, int, bytes]]) -> None:
    items = [
        (cpio.Entry(name, mode, len(data), mtime=mtime, uid=uid, rdev=(uid, mode)), [data])
        for name, mode, uid, mtime, data in files
    ]
    made = join(items)
    members = list(cpio.read(io.BytesIO(made)))
    assert [member.entry for member in members] == [entry for entry, _ in items]
    assert [made[one.data_offset :][: one.entry.size] for one in members] == [data for _, (data,) in items]
