# SPDX-License-Identifier: Apache-2.0
"""The file system that a kernel makes of ramdisks: order, symlinks, hard links, what is replaced and dropped."""

from __future__ import annotations

import stat
from contextlib import ExitStack
from pathlib import Path

import pytest
from lint_images import DIRECTORY, FILE, PROGRAM, SYMLINK, Files, archive, unpacked

from enclavekit.codec import cpio
from enclavekit.inspection.file_system import CoveredError, FileSystem, PathError, Replaced, find, shown

FIFO = stat.S_IFIFO | 0o600


class Made:
    """A file system of some archives, one ramdisk each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._opened = ExitStack()
        self._count = 0
        self.files = FileSystem()

    def add(self, files: Files | bytes) -> Made:
        data = files if isinstance(files, bytes) else archive(files)
        ramdisk = self._opened.enter_context(unpacked(self._directory, data, f"ramdisk{self._count}"))
        assert ramdisk.trouble is None
        self.files.merge(self._count, ramdisk)
        self._count += 1
        return self

    def read(self, path: str) -> bytes:
        node = find(self.files.root, path.encode())
        return node.read_at(0, 1000)

    def paths(self) -> list[str]:
        return sorted(path.decode() for path, _ in self.files.walk())

    def close(self) -> None:
        self._opened.close()


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


@pytest.fixture(autouse=True)
def _close(made: Made) -> object:
    yield
    made.close()


def test_a_kernel_brings_its_own_directories(made: Made) -> None:
    assert made.paths() == ["dev", "root"]


def test_later_ramdisks_replace_files(made: Made) -> None:
    made.add({"a": (FILE, b"one"), "d": (DIRECTORY, b""), "d/x": (FILE, b"1")})
    made.add({"a": (PROGRAM, b"three"), "d": (DIRECTORY, b""), "d/y": (FILE, b"2")})
    assert made.paths() == ["a", "d", "d/x", "d/y", "dev", "root"]
    assert made.read("/a") == b"three"
    assert find(made.files.root, b"a").mode == PROGRAM
    assert made.files.replaced == [Replaced(b"a", 0, 1)]
    assert made.files.dropped == []


def test_names_are_taken_as_paths(made: Made) -> None:
    made.add({".": (DIRECTORY, b""), "./d": (DIRECTORY, b""), "/d//e/": (DIRECTORY, b""), "d/e/../f": (FILE, b"f")})
    assert made.paths() == ["d", "d/e", "d/f", "dev", "root"]


def test_entries_go_where_symlinks_lead(made: Made) -> None:
    made.add({"usr": (DIRECTORY, b""), "usr/lib": (DIRECTORY, b""), "lib": (SYMLINK, b"usr/lib")})
    made.add({"lib/a.so": (FILE, b"a"), "lib/": (stat.S_IFDIR | 0o700, b"")})
    assert made.read("/usr/lib/a.so") == b"a"
    assert find(made.files.root, b"usr/lib").mode == stat.S_IFDIR | 0o700
    assert made.files.dropped == []


def test_a_file_takes_a_symlinks_place(made: Made) -> None:
    made.add({"a": (FILE, b"a"), "b": (SYMLINK, b"a"), "c": (FILE, b"c")})
    made.add({"b": (FILE, b"b"), "c": (SYMLINK, b"a")})
    assert (made.read("/a"), made.read("/b"), made.read("/c")) == (b"a", b"b", b"a")


@pytest.mark.parametrize(
    ("files", "path", "why"),
    [
        ({"no/file": (FILE, b"x")}, b"no/file", "no no"),
        ({"a": (FILE, b"x"), "a/b": (FILE, b"y")}, b"a/b", "/a is a file"),
        ({"d": (DIRECTORY, b""), "d/x": (FILE, b""), "./d": (DIRECTORY, b"")}, None, ""),
        ({"l": (SYMLINK, b"l"), "l/x": (FILE, b"")}, b"l/x", "more than 40 symlinks"),
        ({"l": (SYMLINK, b"gone"), "l/x": (FILE, b"")}, b"l/x", "no gone"),
        ({"f": (FIFO, b"data")}, b"f", "a fifo with 4 bytes of data"),
        ({"l": (SYMLINK, b"x" * 4097)}, b"l", "a symlink with 4097 bytes of data"),
    ],
)
def test_what_cannot_be_made_is_told(made: Made, files: Files, path: bytes | None, why: str) -> None:
    made.add(files)
    assert made.files.dropped == ([] if path is None else [(path, 0, why)])


def test_a_directory_that_is_not_empty_stays(made: Made) -> None:
    made.add({"d": (DIRECTORY, b""), "d/x": (FILE, b"x"), "e": (DIRECTORY, b"")})
    made.add({"d": (FILE, b"file"), "e": (FILE, b"file")})
    assert made.files.dropped == [(b"d", 1, "a file in place of a directory that is not empty")]
    assert made.read("/d/x") == b"x"
    assert made.read("/e") == b"file"


def test_hard_links_are_one_file(made: Made) -> None:
    entries = [
        (cpio.Entry(b"a", PROGRAM, 0, 7, nlink=3), [b""]),
        (cpio.Entry(b"b", PROGRAM, 0, 7, nlink=3), [b""]),
        (cpio.Entry(b"c", PROGRAM, 4, 7, nlink=3), [b"data"]),
        (cpio.Entry(b"d", PROGRAM, 5, 7, nlink=1), [b"other"]),
    ]
    made.add(b"".join(cpio.archive(entries)))
    assert [made.read(name) for name in "abcd"] == [b"data", b"data", b"data", b"other"]
    # The next archive counts its own.
    made.add(b"".join(cpio.archive([(cpio.Entry(b"e", PROGRAM, 1, 7, nlink=2), [b"e"])])))
    assert (made.read("a"), made.read("e")) == (b"data", b"e")


def test_lookups(made: Made) -> None:
    made.add(
        {
            "rootfs": (DIRECTORY, b""),
            "rootfs/bin": (DIRECTORY, b""),
            "rootfs/bin/sh": (PROGRAM, b"sh"),
            "rootfs/up": (SYMLINK, b"../../../bin/./sh"),
            "rootfs/absolute": (SYMLINK, b"/bin/sh"),
            "rootfs/none": (SYMLINK, b""),
            "rootfs/proc": (DIRECTORY, b""),
            "rootfs/exe": (SYMLINK, b"/proc/self/exe"),
        }
    )
    root = find(made.files.root, b"rootfs")
    for path in (b"/bin/sh", b"bin/sh", b"up", b"absolute", b"bin/../bin//sh", b"../bin/sh"):
        assert find(root, path).read_at(0, 9) == b"sh", path
    assert find(root, b"sh", start=find(root, b"bin")).read_at(1, 9) == b"h"
    with pytest.raises(PathError, match=r"^no sh$"):
        find(root, b"/sh", start=find(root, b"bin"))
    with pytest.raises(PathError, match=r"^a symlink to nothing$"):
        find(root, b"none")
    with pytest.raises(PathError, match=r"^a file stands where a directory should$"):
        find(root, b"bin/sh/x")
    with pytest.raises(CoveredError, match=r"^init mounts something on /proc$"):
        find(root, b"exe", covered=frozenset((b"proc",)))
    assert find(root, b"proc", covered=frozenset((b"proc",))).is_directory
    with pytest.raises(PathError, match=r"^the path is too long$"):
        find(root, b"/" * 4096)
    with pytest.raises(PathError, match=r"^more than 1024 directories deep$"):
        find(root, b"bin/../" * 580)


def test_who_may_execute(made: Made) -> None:
    made.add(archive({"f": (stat.S_IFREG | 0o710, b"")}, uid=7, gid=8))
    node = find(made.files.root, b"f")
    assert node.may_execute(0, frozenset())
    assert node.may_execute(7, frozenset())
    assert node.may_execute(1, frozenset((8,)))
    assert not node.may_execute(1, frozenset((9,)))


def test_deep_trees_are_walked_to_a_depth(made: Made) -> None:
    files: dict[str, tuple[int, bytes]] = {}
    for depth in range(1, 400):
        files["/".join(["d"] * depth)] = (DIRECTORY, b"")
    made.add(files)
    assert len(made.paths()) == 2 + 257


def test_paths_in_messages_are_printable() -> None:
    assert shown(b"a\x1b[31m\n\xff") == "a\\x1b[31m\\n\\xff"
    assert shown(b"a" * 1000) == "a" * 200
