# SPDX-License-Identifier: Apache-2.0
"""Directories and tars as trees."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import socket
import stat
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enclavekit.errors import Error, FileError, SourceError
from enclavekit.image import decompress
from enclavekit.image import tar as tar_module
from enclavekit.image.sources import Source, open_directory, open_tar
from enclavekit.image.tree import Node


def content(node: Node | None) -> bytes:
    assert node is not None
    return b"".join(node.content.chunks())


def listing(source: Source) -> list[tuple[bytes, str, int]]:
    return [(path, node.kind, stat.S_IMODE(node.mode)) for path, node in source.tree.items()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    (made / "bin").mkdir(parents=True)
    (made / "bin/app").write_bytes(b"app")
    (made / "bin/app").chmod(0o4755)
    os.link(made / "bin/app", made / "bin/other")
    (made / "link").symlink_to("/etc/passwd")
    os.mkfifo(made / "fifo", 0o600)
    made.chmod(0o711)
    (made / "bin").chmod(0o755)
    os.utime(made / "bin/app", (100, 200))
    return made


class TestDirectory:
    def test_all_kinds(self, root: Path) -> None:
        with open_directory(root) as source:
            assert listing(source) == [
                (b"", "directory", 0o711),
                (b"bin", "directory", 0o755),
                (b"bin/app", "file", 0o4755),
                (b"bin/other", "file", 0o4755),
                (b"fifo", "fifo", 0o600),
                (b"link", "symlink", 0o777),
            ]
            app = source.tree.get(b"bin/app")
            assert app is source.tree.get(b"bin/other")
            assert app is not None
            assert app.mtime == 200
            assert content(app) == b"app"
            assert content(source.tree.get(b"link")) == b"/etc/passwd"
            assert source.warnings == []

    def test_owners(self, root: Path) -> None:
        status = (root / "bin/app").stat()
        for keep, expected in ((False, (0, 0)), (True, (status.st_uid, status.st_gid))):
            with open_directory(root, keep_owners=keep) as source:
                assert {(node.uid, node.gid) for _, node in source.tree.items()} == {expected}

    def test_sockets_are_left_out_with_a_word(self, root: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            # Short of the length limit of socket paths, wherever the tests run.
            here = os.open(root, os.O_PATH)
            listener.bind(f"/proc/self/fd/{here}/sock")
            os.close(here)
            with open_directory(root) as source:
                assert b"sock" not in source.tree
                assert source.warnings == ["sock: a socket, left out"]

    def test_names_of_any_bytes(self, root: Path) -> None:
        (root / os.fsdecode(b"\xff\n")).write_bytes(b"x")
        with open_directory(root) as source:
            assert content(source.tree.get(b"\xff\n")) == b"x"

    @pytest.mark.parametrize(
        "change",
        [
            lambda path: path.write_bytes(b"longer"),
            lambda path: os.utime(path, (1, 1)),
            lambda path: (path.with_name("new").write_bytes(b"app"), path.with_name("new").replace(path)),
        ],
    )
    def test_changed_files_are_an_error(self, root: Path, change: Callable[[Path], Any]) -> None:
        with open_directory(root) as source:
            change(root / "bin/app")
            with pytest.raises(SourceError) as caught:
                content(source.tree.get(b"bin/app"))
            assert caught.value.message == f"{root}/bin/app: changed while the image was made"

    def test_file_that_grows_while_it_is_read(self, root: Path) -> None:
        (root / "big").write_bytes(bytes(1 << 20))
        with open_directory(root) as source:
            node = source.tree.get(b"big")
            assert node is not None
            chunks = node.content.chunks()
            next(chunks)
            with (root / "big").open("ab") as file:
                file.write(b"more")
            with pytest.raises(SourceError, match="changed while the image was made"):
                list(chunks)

    def test_file_that_becomes_a_symlink_or_goes(self, root: Path) -> None:
        with open_directory(root) as source:
            node = source.tree.get(b"bin/app")
            (root / "bin/app").unlink()
            with pytest.raises(FileError) as caught:
                content(node)
            assert caught.value.message == f"cannot read {root}/bin/app: no such file or directory"
            (root / "bin/app").symlink_to("other")
            with pytest.raises(FileError) as caught:
                content(node)
            assert caught.value.message == f"cannot read {root}/bin/app: too many levels of symbolic links"

    def test_not_a_directory(self, root: Path) -> None:
        with pytest.raises(SourceError) as caught:
            open_directory(root / "bin/app")
        assert caught.value.message == f"{root}/bin/app: expected a directory"
        with pytest.raises(FileError) as unread:
            open_directory(root / "none")
        assert unread.value.message == f"cannot read {root}/none: no such file or directory"


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:  # noqa: A002
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as made:
        for info, data in members:
            made.addfile(info, io.BytesIO(data))
    return out.getvalue()


SAMPLE = tar(
    member("./", tarfile.DIRTYPE, mode=0o711, mtime=5),
    member("./bin/app", data=b"x" * 700, mode=0o4755, uid=1000, gid=100, mtime=7),
    member("./bin/sh", tarfile.SYMTYPE, linkname="/bin/app"),
    member("bin/again", tarfile.LNKTYPE, linkname="./bin/app"),
    member("/dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    member("dev/sda", tarfile.BLKTYPE, devmajor=8, devminor=0),
    member("run/pipe", tarfile.FIFOTYPE),
)


def saved(directory: Path, data: bytes) -> Path:
    path = directory / "root.tar"
    path.write_bytes(data)
    return path


def refusal(directory: Path, data: bytes) -> str:
    with pytest.raises(SourceError) as caught:
        open_tar(saved(directory, data))
    return caught.value.message.removeprefix(f"{directory}/")


class TestTar:
    @pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
    def test_all_kinds(self, tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
        with open_tar(saved(tmp_path, compress(SAMPLE)), scratch=tmp_path) as source:
            assert listing(source) == [
                (b"", "directory", 0o711),
                (b"bin", "directory", 0o755),
                (b"bin/again", "file", 0o4755),
                (b"bin/app", "file", 0o4755),
                (b"bin/sh", "symlink", 0o644),
                (b"dev", "directory", 0o755),
                (b"dev/null", "character device", 0o666),
                (b"dev/sda", "block device", 0o644),
                (b"run", "directory", 0o755),
                (b"run/pipe", "fifo", 0o644),
            ]
            app, null = source.tree.get(b"bin/app"), source.tree.get(b"dev/null")
            assert app is not None
            assert null is not None
            assert (app.uid, app.gid, app.mtime) == (1000, 100, 7)
            assert app is source.tree.get(b"bin/again")
            assert content(app) == b"x" * 700
            assert content(source.tree.get(b"bin/sh")) == b"/bin/app"
            assert null.rdev == (1, 3)
            assert source.tree.newest() == 7
        assert os.listdir(tmp_path) == ["root.tar"]  # noqa: PTH208

    @pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_long_names_and_odd_bytes(self, tmp_path: Path, format: int) -> None:  # noqa: A002
        name = "d/" * 90 + os.fsdecode(b"\xc3\xa9")
        data = tar(member(name, data=b"a"), member("l", tarfile.SYMTYPE, linkname=name), format=format)
        with open_tar(saved(tmp_path, data)) as source:
            assert content(source.tree.get(name.encode())) == b"a"
            assert content(source.tree.get(b"l")) == name.encode()

    def test_later_members_win(self, tmp_path: Path) -> None:
        with open_tar(saved(tmp_path, tar(member("a", data=b"1"), member("a", data=b"22")))) as source:
            assert content(source.tree.get(b"a")) == b"22"

    def test_times_stay_in_bounds(self, tmp_path: Path) -> None:
        data = tar(member("a", mtime=-5), member("b", mtime=1 << 40), member("c", mtime=1.9), format=tarfile.PAX_FORMAT)
        with open_tar(saved(tmp_path, data)) as source:
            assert [node.mtime for _, node in source.tree.items()] == [0, 0, 0xFFFFFFFF, 1]

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (tar(member("../x")), "../x: a path with .., expected one that stays inside"),
            (tar(member("a", tarfile.SYMTYPE, linkname="/"), member("a/x")), "a/x: lies in a, which is a symlink,"),
            (tar(member("a", tarfile.LNKTYPE, linkname="b")), "a: a hard link to b, which did not come before"),
            (tar(member("a", b"Z")), "root.tar: member a is of type b'Z', which no ramdisk can hold"),
            (
                tar(
                    member("a", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}),
                    format=tarfile.PAX_FORMAT,
                ),
                "root.tar: member a is a sparse file, which no ramdisk can hold",
            ),
            (tar(member("/")), "root.tar: a member without a name"),
            (
                tar(member("a", uid=1 << 32)),
                "root.tar: member a has owner 4294967296:0, expected 32-bit numbers",
            ),
            (b"junk" * 300, "root.tar: not a tar, or a broken one: invalid header"),
            (b"", "root.tar: not a tar, or a broken one: empty file"),
            (SAMPLE[:1000], "root.tar: no end of the archive at offset 0x200: broken, or cut off"),
            (SAMPLE[:1700], "root.tar: member bin/app is cut off"),
            (SAMPLE[:512], "root.tar: no end of the archive at offset 0x200: broken, or cut off"),
            (
                SAMPLE[:512] + b"junk" + SAMPLE[516:],
                "root.tar: no end of the archive at offset 0x200: broken, or cut off",
            ),
            (gzip.compress(SAMPLE, mtime=0)[:-9], "root.tar: gzip ends before its stream does"),
            (b"\x1f\x8b" + bytes(20), "root.tar: damaged gzip: error -3 while decompressing data: "),
            (b"BZh9" + bytes(20), "root.tar: damaged bzip2: invalid data stream"),
            (b"\xfd7zXZ\0" + bytes(20), "root.tar: damaged xz: corrupt input data"),
            (b"\x28\xb5\x2f\xfd", "root.tar: zstd ends before its stream does"),
        ],
    )
    def test_refused(self, tmp_path: Path, data: bytes, message: str) -> None:
        assert refusal(tmp_path, data).startswith(message)

    def test_negative_size(self, tmp_path: Path) -> None:
        header = bytearray(tar(member("a"))[:512])
        header[124:136] = (-1024 % (1 << 96)).to_bytes(12, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        message = refusal(tmp_path, SAMPLE[:512] + bytes(header) + bytes(1024))
        assert message == "root.tar: member at offset 0x200 has a negative size"

    def test_endless(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tar_module, "MAX_UNPACKED_SIZE", 9000)
        assert refusal(tmp_path, gzip.compress(SAMPLE)) == "root.tar: gzip becomes more than 9000 bytes"

    def test_several_streams(self, tmp_path: Path) -> None:
        half = len(SAMPLE) // 2
        (tmp_path / "two.tar").write_bytes(gzip.compress(SAMPLE[:half]) + gzip.compress(SAMPLE[half:]))
        (tmp_path / "one.tar").write_bytes(SAMPLE)
        with open_tar(tmp_path / "two.tar") as two, open_tar(tmp_path / "one.tar") as one:
            assert [path for path, _ in two.tree.items()] == [path for path, _ in one.tree.items()]
        monkeypatch = pytest.MonkeyPatch()
        with monkeypatch.context() as patched:
            patched.setattr(decompress, "MAX_STREAMS", 1)
            message = refusal(tmp_path, gzip.compress(SAMPLE[:half]) + gzip.compress(SAMPLE[half:]))
        assert message == "root.tar: more than 1 gzip streams"

    def test_a_name_that_looks_compressed(self, tmp_path: Path) -> None:
        """The magic of lzma is a member's name: tars are not compressed with it."""
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            tar.addfile(tarfile.TarInfo("]"), io.BytesIO())
        (tmp_path / "root.tar").write_bytes(made.getvalue())
        with open_tar(tmp_path / "root.tar") as source:
            assert b"]" in source.tree

    def test_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(FileError) as caught:
            open_tar(tmp_path / "none.tar")
        assert caught.value.message == f"cannot read {tmp_path}/none.tar: no such file or directory"
        with pytest.raises(FileError) as caught:
            open_tar(saved(tmp_path, gzip.compress(SAMPLE)), scratch=tmp_path / "none")
        assert caught.value.message == f"cannot make a temporary file in {tmp_path}/none: no such file or directory"

    def test_unpacked_to_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(dir: Path | None) -> io.BufferedWriter:  # noqa: A002
            return Path("/dev/full").open("wb")

        monkeypatch.setattr(tempfile, "TemporaryFile", full)
        with pytest.raises(FileError) as caught:
            open_tar(saved(tmp_path, gzip.compress(SAMPLE)))
        assert caught.value.message == f"cannot unpack {tmp_path}/root.tar: no space left on device"


@settings(max_examples=200)
@given(st.integers(0, len(SAMPLE)), st.binary(max_size=600), st.booleans())
def test_any_bytes_are_a_tree_or_refused(position: int, junk: bytes, insert: bool) -> None:
    data = SAMPLE[:position] + junk + SAMPLE[position + (0 if insert else len(junk)) :]
    with io.BytesIO(data) as file:
        try:
            members = list(tar_module.read_tar(file, "root.tar"))
        except Error as error:
            assert error.message.startswith("root.tar: ") or ": a path with " in error.message  # noqa: PT017
        else:
            assert all(b".." not in member.path.split(b"/") for member in members)
