# SPDX-License-Identifier: Apache-2.0
"""nitro-cli's ramdisks: its archives byte for byte, and what it does to a root file system."""

from __future__ import annotations

import io
import stat
from dataclasses import replace

import pytest
from eif_images import APPLICATION, BOOT
from shared_data import DIRECTORY, needs_shared_data

from enclavekit.codec import cpio
from enclavekit.eif import BytesContent
from enclavekit.errors import SourceError
from enclavekit.image.linuxkit import MADE, LinuxkitRamdisk, Named, bootstrap_ramdisk, customer_ramdisk, exported
from enclavekit.image.tree import Node, Tree

FILE, SYMLINK, FOLDER = stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777, stat.S_IFDIR | 0o755
NOW = 1_700_000_000


def made(ramdisk: LinuxkitRamdisk) -> bytes:
    data = b"".join(ramdisk.chunks())
    assert len(data) == ramdisk.size
    return data


def entries(ramdisk: LinuxkitRamdisk) -> list[tuple[bytes, int, int, bytes]]:
    """Name, mode, time, data."""
    data = made(ramdisk)
    return [
        (one.entry.name, one.entry.mode, one.entry.mtime, data[one.data_offset :][: one.entry.size])
        for one in cpio.read(io.BytesIO(data))
    ]


def node(mode: int = FILE, data: bytes = b"") -> Node:
    return Node(mode, mtime=NOW, content=BytesContent(data))


def test_the_first_ramdisk() -> None:
    ramdisk = bootstrap_ramdisk(BytesContent(b"#!init\n"), BytesContent(b"\x7fELF-nsm"))
    assert made(ramdisk) == BOOT


def test_the_archive_of_the_second() -> None:
    """Its parts as they stand in an archive that was made without this code."""
    directory = replace(node(FOLDER), mtime=MADE)
    nodes: list[Named] = [
        (b"rootfs", directory),
        (b"rootfs/bin/", node(FOLDER)),
        (b"rootfs/bin/hello.sh", node(stat.S_IFREG | 0o755, b"#!/bin/sh\necho hello\n")),
        (b"rootfs/bin/hi", node(SYMLINK, b"hello.sh")),
        *((b"rootfs" + name, directory) for name in (b"", b"/dev", b"/run", b"/sys", b"/var", b"/proc", b"/tmp")),
        (b"cmd", replace(node(FILE, b"/bin/hello.sh\n"), mtime=MADE)),
        (b"env", replace(node(FILE, b"PATH=/bin\nHELLO=Hello from the enclave side!\n"), mtime=MADE)),
    ]
    assert made(LinuxkitRamdisk.of(nodes)) == APPLICATION


@needs_shared_data
def test_the_same_as_the_stored_ones() -> None:
    assert (DIRECTORY / "rd0.cpio").read_bytes() == BOOT
    assert (DIRECTORY / "rd1.cpio").read_bytes() == APPLICATION


def test_an_empty_root() -> None:
    """All that is made when the image has nothing: the defaults, then the directories again."""
    names = [name for name, *_ in entries(customer_ramdisk([], [b"/app"], []))]
    assert names == [
        *(b"rootfs", b"rootfs/dev", b"rootfs/dev/pts", b"rootfs/dev/shm", b"rootfs/etc", b"rootfs/etc/hosts"),
        *(b"rootfs/etc/mtab", b"rootfs/etc/resolv.conf", b"rootfs/proc", b"rootfs/sys"),
        *(b"rootfs", b"rootfs/dev", b"rootfs/run", b"rootfs/sys", b"rootfs/var", b"rootfs/proc", b"rootfs/tmp"),
        *(b"cmd", b"env"),
    ]


def test_what_becomes_of_entries() -> None:
    root: list[Named] = [
        (b".dockerenv", node()),
        (b"bin/", node(FOLDER)),
        (b"bin/one", node(stat.S_IFREG | 0o4755, b"one")),
        (b"dev/", node(FOLDER)),
        (b"dev/console", node()),
        (b"dev/pts/", node(FOLDER)),
        (b"dev/shm", node()),
        (b"etc/", node(FOLDER)),
        (b"etc/hostname", node()),
        (b"etc/hosts", node(stat.S_IFREG | 0o755, b"mine")),
        (b"etc/resolv.conf", node(stat.S_IFREG | 0o755, b"mine")),
        (b"etc/mtab", node(SYMLINK, b"/x")),
    ]
    found = {
        name: rest for name, *rest in entries(customer_ramdisk(root, [b"/app", b"x y"], [b"A=1"]))[: len(root) + 1]
    }
    assert found[b"rootfs/etc/hosts"] == [
        stat.S_IFREG | 0o755,
        MADE,
        b"127.0.0.1       localhost\n::1     localhost ip6-localhost ip6-loopback\nfe00::0 ip6-localnet\n"
        b"ff00::0 ip6-mcastprefix\nff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n",
    ]
    assert found[b"rootfs/etc/resolv.conf"] == [stat.S_IFLNK | 0o755, MADE, b"/run/resolvconf/resolv.conf"]
    assert found[b"rootfs/bin/one"] == [stat.S_IFREG | 0o4755, NOW, b"one"]
    assert found[b"rootfs/bin/"] == [FOLDER, NOW, b""]
    assert found[b"rootfs/dev/"] == [FOLDER, MADE, b""]
    assert found[b"rootfs/dev/pts/"] == [FOLDER, MADE, b""]
    assert found[b"rootfs/etc/mtab"] == [SYMLINK, MADE, b"/x"]
    names = [name for name, *_ in entries(customer_ramdisk(root, [b"/app", b"x y"], [b"A=1"]))]
    for dropped in (b".dockerenv", b"dev/console", b"dev/shm", b"etc/hostname"):
        assert names.count(b"rootfs/" + dropped) == (1 if dropped == b"dev/shm" else 0)
    last = entries(customer_ramdisk(root, [b"/app", b"x y"], [b"A=1"]))[-2:]
    assert [(name, data) for name, _, _, data in last] == [(b"cmd", b"/app\nx y\n"), (b"env", b"A=1\n")]


def test_hard_links_become_symlinks() -> None:
    shared = node(stat.S_IFREG | 0o755, b"data")
    root = [(b"a/one", shared), (b"a/two", shared), (b"b/c/three", shared)]
    found = {name: (mode, data) for name, mode, _, data in entries(customer_ramdisk(root, [], []))}
    assert found[b"rootfs/a/one"] == (stat.S_IFREG | 0o755, b"data")
    assert found[b"rootfs/a/two"] == (stat.S_IFLNK | 0o755, b"one")
    assert found[b"rootfs/b/c/three"] == (stat.S_IFLNK | 0o755, b"../../a/one")


def test_the_order_of_an_export() -> None:
    """As directories are walked, not as bytes sort: a slash comes before everything."""
    tree = Tree()
    for path in (b"a/x", b"a-b", b"a.c/y", b"b"):
        tree.add(path, node())
    names = [name for name, _ in exported(tree) if name[:1] in b"ab"]
    assert names == [b"a/", b"a/x", b"a-b", b"a.c/", b"a.c/y", b"b"]
    assert {b"dev/console", b"etc/hosts", b"etc/mtab", b"proc/", b"sys/", b".dockerenv"} <= {
        name for name, _ in exported(tree)
    }


def test_files_that_are_too_large() -> None:
    class Huge:
        size = 1 << 32

        def chunks(self) -> list[bytes]:
            return []

    with pytest.raises(SourceError) as caught:
        customer_ramdisk([(b"huge", Node(FILE, content=Huge()))], [], [])  # type: ignore[arg-type]
    assert caught.value.message == "cpio entry rootfs/huge: 4294967296 bytes, at most 4294967295 fit in this format"
