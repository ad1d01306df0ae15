# SPDX-License-Identifier: Apache-2.0
"""Files into a parent and out of it, with a parent that lies."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import stat
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from enclavekit.eif import BytesContent
from enclavekit.errors import Error, FileError, FormatError, LabError
from enclavekit.image.ramdisk import Ramdisk
from enclavekit.image.tree import Node
from enclavekit.lab.agent_frames import STATUS, Command, Decoder, Kind, encode
from enclavekit.lab.copy import PACK, copy_in, copy_out

FILE = stat.S_IFREG | 0o644
DIRECTORY = stat.S_IFDIR | 0o755
SYMLINK = stat.S_IFLNK | 0o777


class Parent:
    """Answers one command after the other: what it writes, what it says on stderr, its status."""

    def __init__(self, *answers: tuple[bytes, bytes, int]) -> None:
        self._answers = list(answers)
        self.commands: list[Command] = []
        self.input = bytearray()
        self._threads: list[threading.Thread] = []

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=self._serve, args=(theirs, self._answers.pop(0)))
        thread.start()
        self._threads.append(thread)
        return ours

    def _serve(self, connection: socket.socket, answer: tuple[bytes, bytes, int]) -> None:
        decoder, ended = Decoder(), False
        out, err, status = answer
        with connection:
            while not ended:
                data = connection.recv(1 << 16)
                assert data, "hung up before the end of its input"
                for kind, payload in decoder.feed(data):
                    if kind is Kind.RUN:
                        self.commands.append(Command.decode(payload))
                    else:
                        self.input += payload
                        ended = not payload
            for at in range(0, len(out), 1000):
                connection.sendall(encode(Kind.STDOUT, out[at : at + 1000]))
            connection.sendall(encode(Kind.STDERR, err) + encode(Kind.STATUS, STATUS.pack(status)))

    def join(self) -> None:
        for thread in self._threads:
            thread.join(10)


def archive(*nodes: tuple[bytes, int, bytes]) -> bytes:
    return b"".join(Ramdisk([(name, Node(mode, content=BytesContent(data))) for name, mode, data in nodes]).chunks())


def fetch(parent: Parent, source: str, target: Path) -> None:
    try:
        copy_out(parent.connect, source, target)
    finally:
        parent.join()


def test_a_file_comes_out_under_the_name_that_was_asked_for(tmp_path: Path) -> None:
    fetch(Parent((archive((b"./passwd", FILE, b"root")), b"", 0)), "/etc/passwd", tmp_path / "own")
    fetch(Parent((archive((b"other", FILE, b"root")), b"", 0)), "/etc/passwd", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"own": b"root", "passwd": b"root"}


def test_a_directory_with_what_is_in_it(tmp_path: Path) -> None:
    data = archive((b"d", DIRECTORY, b""), (b"d/a", FILE | 0o111, b"x"), (b"d/l", SYMLINK, b"a"))
    fetch(Parent((data, b"", 0)), "/root/d", tmp_path)
    assert (tmp_path / "d/a").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "d/l").read_bytes() == b"x"


@pytest.mark.parametrize(
    "nodes",
    [
        [(b"../out", FILE, b"x")],
        [(b"a/../../out", FILE, b"x")],
        [(b"a", SYMLINK, b".."), (b"a/out", FILE, b"x")],
        [(b"a", SYMLINK, b"/tmp"), (b"a/out", FILE, b"x")],
        [(b"a", FILE, b"x"), (b"b", FILE, b"x")],
        [],
    ],
)
def test_nothing_comes_out_anywhere_else(tmp_path: Path, nodes: Sequence[tuple[bytes, int, bytes]]) -> None:
    inner = tmp_path / "in/ner"
    inner.mkdir(parents=True)
    with contextlib.suppress(Error):
        fetch(Parent((archive(*nodes), b"", 0)), "/x", inner / "x")
    assert {path.name for path in inner.iterdir()} <= {"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["ner"]


def test_a_symlink_does_not_take_the_place_of_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(LabError) as caught:
        fetch(Parent((archive((b"x", SYMLINK, b"mine")), b"", 0)), "/x", tmp_path / "x")
    assert caught.value.message == "/x: a symlink came from the parent, expected what it leads to"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_would_become_larger_than_it_was_sent(tmp_path: Path) -> None:
    data = gzip.compress(archive((b"x", FILE, bytes(1 << 20))), mtime=0)
    with pytest.raises(FormatError) as caught:
        fetch(Parent((data, b"", 0)), "/x", tmp_path / "x")
    assert caught.value.message == "ramdisk at offset 0x0: gzip, expected a plain archive"
    assert list(tmp_path.iterdir()) == []


def test_directories_that_nobody_may_write_to(tmp_path: Path) -> None:
    shut = stat.S_IFDIR | 0o500
    nothing = stat.S_IFDIR
    fetch(Parent((archive((b"d", shut, b""), (b"d/in", nothing, b"")), b"", 0)), "/d", tmp_path)
    assert [stat.S_IMODE((tmp_path / path).stat().st_mode) for path in ("d", "d/in")] == [0o700, 0o700]


def test_what_is_packed(tmp_path: Path) -> None:
    """By the script itself; in cpio's place is a program that says which names it was given."""
    (tmp_path / "bin").mkdir()
    busybox = tmp_path / "bin/busybox"
    busybox.write_text("#!/bin/sh\npwd\ntr '\\0' '\\n'\n")
    busybox.chmod(0o755)
    place = tmp_path.resolve() / "-place"
    (place / "d").mkdir(parents=True)
    (place / "d/link").symlink_to("/etc")
    (place / "asked").symlink_to("d")
    (place / "nowhere").symlink_to("missing")
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    said = {}
    for name in ("asked", "../-place/d/", "nowhere"):
        words = ["bash", "-o", "pipefail", "-c", PACK, "sh", name]
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
        said[name] = (done.returncode, done.stdout + done.stderr)
    packed = (0, f"{place}\n./d\n./d/link\n")
    assert said == {"asked": packed, "../-place/d/": packed, "nowhere": (1, "nowhere: no such file\n")}


def test_what_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        fetch(Parent((b"nonsense", b"", 0)), "/x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LabError) as caught:
        fetch(Parent((b"", b"/x: no such file\n", 1)), "/x", tmp_path / "x")
    assert caught.value.message == "/x: cannot be read in the parent: /x: no such file"


def test_a_directory_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(FileError) as caught:
        fetch(Parent(), "/root/x", tmp_path)
    assert caught.value.message == f"{tmp_path / 'x'}: is a directory, and is left alone"


def give(parent: Parent, source: Path, target: str) -> None:
    try:
        copy_in(parent.connect, source, target)
    finally:
        parent.join()


def test_a_file_goes_in(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    into = Parent((b"", b"", 0), (b"", b"", 0))
    give(into, tmp_path / "a", "/root")
    assert [one.words[-1] for one in into.commands] == ["/root", "/root"]
    assert b"content" in into.input
    renamed = Parent((b"", b"", 1), (b"", b"", 0))
    give(renamed, tmp_path / "a", "/root/b")
    assert [one.words[-1] for one in renamed.commands] == ["/root/b", "/root"]
    assert renamed.input[110:112] == b"b\0"  # the first header's name


def test_what_cannot_go_in(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        give(Parent((b"", b"", 0)), tmp_path / "no", "/root")
    assert caught.value.message == f"cannot read {tmp_path / 'no'}: no such file or directory"
    (tmp_path / "a").touch()
    with pytest.raises(LabError) as refused:
        give(Parent((b"", b"", 1), (b"", b"sh: cd: /no: No such file or directory\n", 1)), tmp_path / "a", "/no/a")
    assert refused.value.message == ("/no/a: cannot be written in the parent: sh: cd: /no: No such file or directory")
