# SPDX-License-Identifier: Apache-2.0
"""Trees as ramdisks, and the boot ramdisk."""

from __future__ import annotations

import io
import stat
from importlib import resources
from typing import Any

import pytest

from enclavekit.codec import cpio
from enclavekit.eif import Arch, BytesContent, Content
from enclavekit.errors import MissingError, SourceError
from enclavekit.image.boot import boot_ramdisk, init_program
from enclavekit.image.modules import Module
from enclavekit.image.ramdisk import Ramdisk, application_ramdisk
from enclavekit.image.tree import Node, Tree


def file(data: bytes, mode: int = 0o644, **fields: int) -> Node:
    return Node(stat.S_IFREG | mode, content=BytesContent(data), **fields)  # type: ignore[arg-type]


def unpacked(ramdisk: Content) -> list[tuple[cpio.Entry, bytes]]:
    data = b"".join(ramdisk.chunks())
    assert len(data) == ramdisk.size
    assert len(data) % 512 == 0
    members = cpio.read(io.BytesIO(data))
    return [(member.entry, data[member.data_offset :][: member.entry.size]) for member in members]


def sample() -> Tree:
    tree = Tree()
    tree.add(b"bin/b", file(b"data", 0o4755, uid=7, gid=8, mtime=9))
    tree.link(b"bin/a", b"bin/b")
    tree.link(b"z", b"bin/b")
    tree.add(b"bin/sh", Node(stat.S_IFLNK | 0o777, content=BytesContent(b"b")))
    tree.add(b"dev/null", Node(stat.S_IFCHR | 0o666, rdev=(1, 3)))
    return tree


def test_application_entries() -> None:
    directory = stat.S_IFDIR | 0o755
    linked: dict[str, Any] = {"mode": stat.S_IFREG | 0o4755, "ino": 4, "uid": 7, "gid": 8, "nlink": 3, "mtime": 9}
    assert unpacked(application_ramdisk(sample(), b"version=1\0")) == [
        (cpio.Entry(b"config", stat.S_IFREG | 0o600, 10, ino=1), b"version=1\0"),
        (cpio.Entry(b"rootfs", directory, ino=2, nlink=2), b""),
        (cpio.Entry(b"rootfs/bin", directory, ino=3, nlink=2), b""),
        (cpio.Entry(b"rootfs/bin/a", **linked), b""),
        (cpio.Entry(b"rootfs/bin/b", **linked), b""),
        (cpio.Entry(b"rootfs/bin/sh", stat.S_IFLNK | 0o777, 1, ino=5), b"b"),
        (cpio.Entry(b"rootfs/dev", directory, ino=6, nlink=2), b""),
        (cpio.Entry(b"rootfs/dev/null", stat.S_IFCHR | 0o666, ino=7, rdev=(1, 3)), b""),
        (cpio.Entry(b"rootfs/z", size=4, **linked), b"data"),
    ]


def test_same_tree_same_bytes_in_large_pieces() -> None:
    tree = sample()
    for number in range(3000):
        tree.add(b"many/%d" % number, file(b"x" * 100))
    first, second = (list(application_ramdisk(tree, b"").chunks()) for _ in range(2))
    assert first == second
    assert len(first) < 10


def test_symlinks_have_targets() -> None:
    for size in (0, 4096):
        link = Node(stat.S_IFLNK | 0o777, content=BytesContent(b"x" * size))
        with pytest.raises(SourceError) as caught:
            Ramdisk([(b"l", link)])
        assert caught.value.message == f"l: a symlink to a path of {size} bytes, expected 1 to 4095"


class Huge:
    """Four GiB that no one reads."""

    size = 1 << 32
    chunks = None


def test_huge_files_are_refused() -> None:
    with pytest.raises(SourceError) as caught:
        Ramdisk([(b"rootfs/f", Node(stat.S_IFREG, content=Huge()))])  # type: ignore[arg-type]
    assert caught.value.message == "cpio entry rootfs/f: 4294967296 bytes, at most 4294967295 fit in this format"
    assert caught.value.hint == "split the file, or bring it into the enclave over vsock"


def test_boot_entries() -> None:
    directory = stat.S_IFDIR | 0o755
    modules = [Module("vsock", b"\x7fELF1", (), ""), Module("nsm", b"\x7fELF2", (), "")]
    assert unpacked(boot_ramdisk(b"#!init", modules)) == [
        (cpio.Entry(b"dev", directory, ino=1, nlink=2), b""),
        (cpio.Entry(b"dev/console", stat.S_IFCHR | 0o600, ino=2, rdev=(5, 1)), b""),
        (cpio.Entry(b"init", stat.S_IFREG | 0o755, 6, ino=3), b"#!init"),
        (cpio.Entry(b"modules", directory, ino=4, nlink=2), b""),
        (cpio.Entry(b"modules/00-vsock.ko", stat.S_IFREG | 0o644, 5, ino=5), b"\x7fELF1"),
        (cpio.Entry(b"modules/01-nsm.ko", stat.S_IFREG | 0o644, 5, ino=6), b"\x7fELF2"),
    ]


def test_boot_without_modules() -> None:
    assert [entry.name for entry, _ in unpacked(boot_ramdisk(b"", []))] == [b"dev", b"dev/console", b"init", b"modules"]
    with pytest.raises(ValueError, match="101 modules, expected at most 100"):
        boot_ramdisk(b"", [Module("m", b"", (), "")] * 101)


@pytest.mark.parametrize("arch", list(Arch))
def test_init_is_there_or_missed_in_words(arch: Arch) -> None:
    if resources.files("enclavekit.image").joinpath(f"init.{arch}").is_file():
        assert init_program(arch).startswith(b"\x7fELF")
        return
    with pytest.raises(MissingError) as caught:
        init_program(arch)
    assert caught.value.message == f"init for {arch}: not in this installation of enclavekit"
    assert caught.value.hint == "run python hatch_build.py in the checkout, or install the package again"
