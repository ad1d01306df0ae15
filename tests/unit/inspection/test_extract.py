# SPDX-License-Identifier: Apache-2.0
"""Images taken apart: sections as files, ramdisks unpacked, and nothing ever outside."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from enclavekit.codec import cpio
from enclavekit.eif import Arch, BytesContent, Section, SectionType, inspect, write
from enclavekit.errors import Error, FileError
from enclavekit.inspection.extract import Extracted, extract

FILE, DIRECTORY, SYMLINK = stat.S_IFREG | 0o640, stat.S_IFDIR | 0o750, stat.S_IFLNK | 0o777
Files = Sequence[tuple[cpio.Entry, bytes]]


def entry(name: bytes, mode: int, data: bytes = b"", *, ino: int = 0, nlink: int = 1) -> tuple[cpio.Entry, bytes]:
    return cpio.Entry(name, mode, len(data), ino=ino, nlink=nlink, mtime=1_000_000_000), data


def archive(files: Files) -> bytes:
    return b"".join(cpio.archive((one, [data] if data else []) for one, data in files))


def image(directory: Path, *ramdisks: bytes) -> Path:
    sections = [
        Section(SectionType.KERNEL, BytesContent(b"kernel")),
        Section(SectionType.CMDLINE, BytesContent(b"quiet")),
        Section(SectionType.METADATA, BytesContent(b"{}")),
        *(Section(SectionType.RAMDISK, BytesContent(one)) for one in ramdisks),
    ]
    out = io.BytesIO()
    write(out, sections, arch=Arch.X86_64)
    path = directory / "image.eif"
    path.write_bytes(out.getvalue())
    return path


def taken_apart(path: Path, directory: Path, *, rootfs: bool = True, devices: bool = False) -> list[Extracted]:
    with path.open("rb") as file:
        return extract(file, inspect(file), directory, name=str(path), rootfs=rootfs, devices=devices)


def unpacked(tmp_path: Path, files: Files, *, devices: bool = False) -> Path:
    taken_apart(image(tmp_path, archive(files)), tmp_path / "out", devices=devices)
    return tmp_path / "out" / "ramdisk-0"


def listing(directory: Path) -> list[str]:
    return [one.name for one in directory.iterdir()]


def test_sections(tmp_path: Path) -> None:
    one, two = archive([entry(b"a", FILE)]), gzip.compress(archive([entry(b"b", FILE)]), mtime=0)
    made = taken_apart(image(tmp_path, one, two), tmp_path / "new" / "out", rootfs=False)
    contents = {found.path.name: found.path.read_bytes() for found in made}
    assert contents == {
        "kernel": b"kernel",
        "cmdline": b"quiet",
        "metadata.json": b"{}",
        "ramdisk-0.cpio": one,
        "ramdisk-1.cpio": two,
    }
    assert [found.compressions for found in made] == [(), (), (), ("none",), ("gzip",)]
    assert sorted(listing(tmp_path / "new" / "out")) == sorted(contents)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = image(tmp_path, archive([]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/cmdline").write_text("mine")
    with pytest.raises(FileError) as caught:
        taken_apart(path, tmp_path / "out")
    assert caught.value.message == f"{tmp_path}/out/cmdline: exists already, and is left alone"
    assert listing(tmp_path / "out") == ["cmdline"]
    assert (tmp_path / "out/cmdline").read_text() == "mine"


def test_files_of_all_kinds(tmp_path: Path) -> None:
    root = unpacked(
        tmp_path,
        [
            entry(b".", DIRECTORY),
            entry(b"dir", stat.S_IFDIR | 0o500),
            entry(b"dir/file", stat.S_IFREG | 0o4755, b"content"),
            entry(b"link", SYMLINK, b"/dir/file"),
            entry(b"pipe", stat.S_IFIFO | 0o644),
            entry(b"deep/er/file", FILE, b"x"),
        ],
    )
    assert (root / "dir/file").read_bytes() == b"content"
    assert stat.S_IMODE((root / "dir/file").stat().st_mode) == 0o755  # not set-user-id
    assert stat.S_IMODE((root / "dir").stat().st_mode) == 0o500
    assert (root / "dir").stat().st_mtime == 1_000_000_000
    assert (root / "link").readlink() == Path("/dir/file")
    assert stat.S_ISFIFO((root / "pipe").stat().st_mode)
    assert (root / "deep/er/file").read_bytes() == b"x"


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no program cpio")
def test_the_same_tree_as_cpio_makes(tmp_path: Path) -> None:
    files = [
        entry(b"bin", DIRECTORY),
        entry(b"bin/app", stat.S_IFREG | 0o755, b"\x7fELF" * 1000),
        entry(b"bin/sh", SYMLINK, b"app"),
        entry(b"etc", DIRECTORY),
        entry(b"etc/one", FILE, ino=7, nlink=2),
        entry(b"etc/two", FILE, b"shared", ino=7, nlink=2),
    ]
    ours = unpacked(tmp_path, files)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    subprocess.run(["cpio", "-idm", "--quiet"], cwd=theirs, input=archive(files), check=True)

    def tree(root: Path) -> dict[str, tuple[int, bytes | str, int]]:
        found = {}
        for path in sorted(root.rglob("*")):
            status = path.lstat()
            content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
            found[str(path.relative_to(root))] = (status.st_mode, content, status.st_nlink)
        return found

    assert tree(ours) == tree(theirs)
    assert tree(ours)["etc/one"] == tree(ours)["etc/two"] == (FILE, b"shared", 2)


def test_later_entries_replace_earlier_ones(tmp_path: Path) -> None:
    root = unpacked(
        tmp_path,
        [
            entry(b"a", FILE, b"first"),
            entry(b"a", FILE, b"second"),
            entry(b"b", FILE, b"file"),
            entry(b"b", DIRECTORY),
            entry(b"c", DIRECTORY),
            entry(b"c", SYMLINK, b"a"),
            entry(b"d", SYMLINK, b"a"),
            entry(b"d", FILE, b"not through the link"),
        ],
    )
    assert (root / "a").read_bytes() == b"second"
    assert (root / "b").is_dir()
    assert (root / "c").readlink() == Path("a")
    assert (root / "d").read_bytes() == b"not through the link"


def test_read_only_hard_links(tmp_path: Path) -> None:
    mode = stat.S_IFREG | 0o444
    root = unpacked(tmp_path, [entry(b"a", mode, ino=3, nlink=2), entry(b"b", mode, b"data", ino=3, nlink=2)])
    assert (root / "a").read_bytes() == (root / "b").read_bytes() == b"data"
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o444


ESCAPES: dict[str, tuple[Files, str | None]] = {
    # files, and what is said of them; None when they are made inside
    "dots": ([entry(b"../escaped", FILE, b"x")], "../escaped: a path with .., expected one that stays inside"),
    "dots inside": (
        [entry(b"a/../../escaped", FILE, b"x")],
        "a/../../escaped: a path with .., expected one that stays inside",
    ),
    "absolute": ([entry(b"/escaped", FILE, b"x")], None),
    "through an absolute symlink": (
        [entry(b"up", SYMLINK, b"/"), entry(b"up/escaped", FILE, b"x")],
        None,
    ),
    "through a relative symlink": (
        [entry(b"up", SYMLINK, b"../../../../../../.."), entry(b"up/escaped", FILE, b"x")],
        None,
    ),
    "through two symlinks": (
        [entry(b"a", SYMLINK, b"b"), entry(b"b", SYMLINK, b"/.."), entry(b"a/escaped", FILE, b"x")],
        None,
    ),
    "a loop": (
        [entry(b"a", SYMLINK, b"b"), entry(b"b", SYMLINK, b"a"), entry(b"a/escaped", FILE, b"x")],
        "a/escaped: more than 40 symlinks on the way",
    ),
    "through a file": (
        [entry(b"a", FILE, b"x"), entry(b"a/escaped", FILE, b"x")],
        "a/escaped: lies in a, which is no directory",
    ),
    "too deep": ([entry(b"a/" * 300 + b"x", FILE)], f"{'a/' * 300}x: more than 256 directories deep"),
    "a long symlink": (
        [entry(b"a", SYMLINK, b"x" * 5000)],
        "a: a symlink of 5000 bytes, expected at most 4095",
    ),
    "directory with files replaced": (
        [entry(b"a/b", FILE), entry(b"a", FILE)],
        "cannot unpack a: directory not empty",
    ),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_leaves_the_directory(name: str, tmp_path: Path) -> None:
    files, message = ESCAPES[name]
    path = image(tmp_path, archive(files))
    before = {one: one.lstat().st_mtime_ns for one in Path("/").glob("escaped*")}
    if message is not None:
        with pytest.raises(Error) as caught:
            taken_apart(path, tmp_path / "out")
        assert caught.value.message.removeprefix("ramdisk-0: ") == message
        assert listing(tmp_path / "out") == []
    else:
        taken_apart(path, tmp_path / "out")
        assert (tmp_path / "out/ramdisk-0/escaped").read_bytes() == b"x"
    assert sorted(listing(tmp_path)) == ["image.eif", "out"]
    assert before == {one: one.lstat().st_mtime_ns for one in Path("/").glob("escaped*")}


@pytest.mark.parametrize(
    "files",
    [
        lambda victim: [
            entry(b"dir", stat.S_IFDIR | 0o777),
            entry(b"same", SYMLINK, b"."),
            entry(b"same/dir", SYMLINK, victim),
        ],
        lambda victim: [
            entry(b"a", stat.S_IFREG | 0o777, ino=3, nlink=2),
            entry(b"a", SYMLINK, victim),
            entry(b"b", stat.S_IFREG | 0o777, ino=3, nlink=2),
        ],
        lambda victim: [
            entry(b"a", stat.S_IFREG | 0o777, ino=3, nlink=2),
            entry(b"a", SYMLINK, victim),
            entry(b"b", stat.S_IFREG | 0o777, b"data", ino=3, nlink=2),
        ],
        lambda victim: [
            entry(b"a", stat.S_IFREG | 0o777, ino=3, nlink=2),
            entry(b"a", stat.S_IFIFO | 0o777),
            entry(b"b", stat.S_IFREG | 0o777, b"data", ino=3, nlink=2),
        ],
    ],
    ids=["a directory", "a link", "a link with data", "a link to a pipe"],
)
def test_what_a_symlink_has_replaced_is_not_followed(files: Callable[[bytes], Files], tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    victim.chmod(0o400)
    root = unpacked(tmp_path, files(bytes(victim)))
    assert (victim.read_bytes(), stat.S_IMODE(victim.stat().st_mode)) == (b"mine", 0o400)
    assert victim.stat().st_nlink == 1
    assert not (root / "b").exists() or stat.S_ISREG((root / "b").lstat().st_mode)


def test_a_directory_that_is_gone_by_another_name_is_an_error(tmp_path: Path) -> None:
    files = [entry(b"dir", DIRECTORY), entry(b"same", SYMLINK, b"."), entry(b"same/dir", stat.S_IFSOCK | 0o600)]
    with pytest.raises(FileError) as caught:
        unpacked(tmp_path, files)
    assert caught.value.message == "cannot unpack dir: no such file or directory"


def test_devices_are_left_out_unless_asked(tmp_path: Path) -> None:
    null = replace(entry(b"null", stat.S_IFCHR | 0o666)[0], rdev=(1, 3))
    block = replace(entry(b"block", stat.S_IFBLK | 0o666)[0], rdev=(7, 0))
    socket = entry(b"socket", stat.S_IFSOCK | 0o666)
    path = image(tmp_path, archive([(null, b""), (block, b""), socket]))
    made = taken_apart(path, tmp_path / "out")
    assert made[-1].files == 0
    assert made[-1].notes == ("1 left out: character device", "1 left out: block device", "1 left out: socket")
    assert listing(tmp_path / "out/ramdisk-0") == []
    if os.geteuid() == 0:
        taken_apart(path, tmp_path / "with", devices=True)
        status = (tmp_path / "with/ramdisk-0/null").stat()
        assert (status.st_mode, status.st_rdev) == (stat.S_IFCHR | 0o666, os.makedev(1, 3))


def test_a_ramdisk_that_ends_early_is_unpacked_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = archive([entry(b"a", FILE, b"x"), entry(b"b", FILE, b"y" * 100)])
    made = taken_apart(image(tmp_path, whole[:300]), tmp_path / "out")
    assert made[-2].notes == ("cpio data at offset 0x345: need 100 bytes, have 72: not all of it could be read",)
    assert listing(tmp_path / "out/ramdisk-0") == ["a"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    path = image(tmp_path, archive([entry(b"a", FILE, b"x" * 300_000)]))
    import resource
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))
    try:
        with pytest.raises(FileError) as caught:
            taken_apart(path, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.message == "cannot write ramdisk-0.cpio: file too large"
    assert listing(tmp_path / "out") == []
