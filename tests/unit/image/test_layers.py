# SPDX-License-Identifier: Apache-2.0
"""Layers applied one to another, held against umoci, which unpacks them to a directory."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from oci_layouts import Entry, directory, gzipped, hard_link, layout, member, opaque, symlink, tar, whiteout

from enclavekit.errors import SourceError
from enclavekit.image import layers as layers_module
from enclavekit.image.container import read_layers
from enclavekit.image.layer_cache import LayerCache
from enclavekit.image.layers import Layers
from enclavekit.image.layouts import open_layout
from enclavekit.image.ramdisk import application_ramdisk
from enclavekit.image.tree import Tree

BASE: Sequence[Entry] = (
    directory("bin"),
    member("bin/app", b"app", mode=0o755),
    directory("etc"),
    member("etc/conf", b"conf"),
    member("etc/passwd", b"root:x:0:0::/:/bin/sh\n"),
    directory("usr"),
    directory("usr/lib"),
    member("usr/lib/one.so", b"one"),
    symlink("lib", "usr/lib"),
)
CASES: dict[str, Sequence[Sequence[Entry]]] = {
    "one layer": [BASE],
    "whiteout of a file": [BASE, [whiteout("etc/conf")]],
    "whiteout of a directory": [BASE, [whiteout("etc")]],
    "whiteout of what is not there": [BASE, [whiteout("etc/none"), whiteout("none/none")]],
    "whiteout and the same name anew": [BASE, [whiteout("etc"), directory("etc"), member("etc/new", b"new")]],
    "whiteout after the same name": [BASE, [member("etc/conf", b"new"), whiteout("etc/conf")]],
    "opaque before": [BASE, [directory("etc"), opaque("etc"), member("etc/new", b"new")]],
    "opaque behind": [BASE, [directory("etc"), member("etc/new", b"new"), opaque("etc")]],
    "hard link in a layer": [[member("a", b"data"), hard_link("b", "a"), hard_link("c", "b")]],
    "hard link across layers": [BASE, [hard_link("app", "bin/app")]],
    "hard link, then the first name goes": [[member("a", b"data"), hard_link("b", "a")], [whiteout("a")]],
    "file to directory": [BASE, [directory("etc/conf"), member("etc/conf/x", b"x")]],
    "directory to file": [BASE, [member("usr", b"file")]],
    "there and back": [BASE, [member("etc", b"file")], [directory("etc"), member("etc/new", b"new")]],
    "directory over directory": [BASE, [directory("etc", 0o700)]],
    "below a symlinked directory": [BASE, [member("lib/two.so", b"two")]],
    "a directory in place of a symlink": [BASE, [directory("lib"), member("lib/two.so", b"two")]],
    "whiteout below a symlinked directory": [BASE, [whiteout("lib/one.so")]],
    "whiteout of a symlink": [BASE, [whiteout("lib")]],
    "set-user-id and sticky": [[directory("tmp", 0o1777), member("su", b"su", mode=0o4755)]],
    "a fifo": [[member("pipe", kind=tarfile.FIFOTYPE)]],
    "an empty layer": [BASE, [], [member("x", b"x")]],
    "names that are not UTF-8": [[member("caf\udce9", b"x"), directory("d\udcff"), member("d\udcff/\udc80", b"y")]],
    "dots and slashes": [[directory("./a/"), member("./a//b", b"x"), member("/c", b"y")]],
    "many files": [[member(f"d{number % 10}/f{number}", b"%d" % number) for number in range(10_000)]],
    "times": [[directory("d", mtime=1_000_000_000), member("d/f", b"x", mtime=1_100_000_000)]],
}


def tree_of(path: Path, scratch: Path) -> dict[bytes, tuple[Any, ...]]:
    """Paths, with type, mode, content or target, and which names are one file."""
    with ExitStack() as files:
        image = open_layout(path, None, None, files)
        tree, _ = read_layers(image, LayerCache(scratch / "cache"), files, lambda name, done, size: None)
        return _listed(tree)


def _listed(tree: Tree) -> dict[bytes, tuple[Any, ...]]:
    first: dict[int, bytes] = {}
    found = {}
    for name, node in tree.items():
        content = b"".join(node.content.chunks())
        found[name] = (stat.S_IFMT(node.mode), node.mode & 0o7777, content, first.setdefault(id(node), name))
    del found[b""]
    return found


def unpacked(path: Path, bundle: Path) -> dict[bytes, tuple[Any, ...]]:
    """The same of what umoci makes."""
    subprocess.run(
        ["umoci", "unpack", "--rootless", "--image", f"{path}:latest", bundle], check=True, capture_output=True
    )
    root = os.fsencode(bundle / "rootfs")
    first: dict[int, bytes] = {}
    found: dict[bytes, list[Any]] = {}
    for parent, directories, names in os.walk(root):
        for name in sorted([*directories, *names]):
            place = parent + b"/" + name
            status = os.lstat(place)
            content = b""
            if stat.S_ISREG(status.st_mode):
                content = Path(os.fsdecode(place)).read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(place)  # noqa: PTH115 - bytes
            relative = place[len(root) + 1 :]
            found[relative] = [stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), content, status.st_ino]
    for relative in sorted(found):
        found[relative][3] = first.setdefault(found[relative][3], relative)
    return {relative: tuple(values) for relative, values in found.items()}


@pytest.mark.skipif(shutil.which("umoci") is None, reason="no program umoci")
@pytest.mark.parametrize("name", CASES)
def test_the_same_tree_as_umoci_makes(name: str, tmp_path: Path) -> None:
    made = layout(tmp_path / "layout", *CASES[name], pack=gzipped, suffix="+gzip")
    assert tree_of(made, tmp_path) == unpacked(made, tmp_path / "bundle")


@pytest.mark.skipif(shutil.which("umoci") is None or os.getuid() != 0, reason="no program umoci, or not root")
def test_the_same_owners_and_devices_as_umoci_makes(tmp_path: Path) -> None:
    layers = [
        [
            directory("home", uid=1000, gid=100),
            member("home/file", b"x", uid=1000, gid=100, mode=0o4755),
            member("null", kind=tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3),
        ],
        [member("home/file", b"y", uid=0, gid=7), member("disk", kind=tarfile.BLKTYPE, devmajor=8, devminor=1, uid=3)],
    ]
    made = layout(tmp_path / "layout", *layers, pack=gzipped, suffix="+gzip")
    subprocess.run(["umoci", "unpack", "--image", f"{made}:latest", tmp_path / "b"], check=True, capture_output=True)
    root = tmp_path / "b/rootfs"
    with ExitStack() as files:
        tree, _ = read_layers(
            open_layout(made, None, None, files), LayerCache(tmp_path / "c"), files, lambda name, done, size: None
        )
    for name, node in tree.items():
        if name:
            status = (root / os.fsdecode(name)).lstat()
            assert (node.mode, node.uid, node.gid) == (status.st_mode, status.st_uid, status.st_gid), name
            assert node.rdev == ((os.major(status.st_rdev), os.minor(status.st_rdev)) if status.st_rdev else (0, 0))
    assert sorted(name for name, _ in tree.items()) == [b"", b"disk", b"home", b"home/file", b"null"]


@pytest.mark.parametrize("suffix", ["", "+gzip", "+zstd"])
def test_compressions(suffix: str, tmp_path: Path) -> None:
    zstd = import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    pack = {"": None, "+gzip": gzipped, "+zstd": zstd.compress}[suffix]
    made = layout(tmp_path / "layout", BASE, [whiteout("etc")], pack=pack, suffix=suffix)
    found = tree_of(made, tmp_path)
    assert b"etc" not in found
    assert found[b"bin/app"] == (stat.S_IFREG, 0o755, b"app", b"bin/app")


def test_devices_and_owners() -> None:
    layers = Layers()
    entries = [
        member("null", kind=tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3),
        member("file", b"x", uid=1000, gid=100),
    ]
    layers.apply(BytesIO(tar(entries)), "x")
    null, file = layers.tree.get(b"null"), layers.tree.get(b"file")
    assert null is not None
    assert file is not None
    assert (null.mode, null.rdev) == (stat.S_IFCHR | 0o666, (1, 3))
    assert (file.uid, file.gid) == (1000, 100)


def test_extended_attributes_are_told_of() -> None:
    layers = Layers()
    capability = {"SCHILY.xattr.security.capability": "x"}
    entries = [
        member("a", pax_headers=capability),
        member("b", pax_headers={**capability, "SCHILY.xattr.user.note": "y"}),
        member("c"),
    ]
    layers.apply(BytesIO(tar(entries)), "x")
    assert layers.warnings() == [
        "extended attribute security.capability of 2 files is lost: no ramdisk can hold it",
        "extended attribute user.note of 1 files is lost: no ramdisk can hold it",
    ]


REFUSED: dict[str, tuple[Sequence[Entry], str]] = {
    "up": ([member("../x")], "../x: a path with .., expected one that stays inside"),
    "up within": ([member("a/../../x")], "a/../../x: a path with .., expected one that stays inside"),
    "hard link out": (
        [hard_link("x", "../../etc/passwd")],
        "../../etc/passwd: a path with .., expected one that stays inside",
    ),
    "hard link to nothing": (
        [hard_link("x", "none")],
        "layer: x is a hard link to none, which is in no layer up to this one",
    ),
    "hard link to a directory": (
        [directory("d"), hard_link("x", "d")],
        "layer: x is a hard link to d, which is a directory",
    ),
    "a loop of symlinks": (
        [symlink("a", "b"), symlink("b", "a"), member("a/x")],
        "a/x: more than 40 symlinks on the way",
    ),
    "a whiteout of nothing": ([member(".wh.")], "layer: whiteout .wh., expected a name after .wh."),
    "a whiteout of here": ([member("d/.wh..")], "layer: whiteout .wh.., expected a name after .wh."),
    "a whiteout of above": ([member("d/.wh...")], "layer: whiteout .wh..., expected a name after .wh."),
    "below a file": (
        [member("file", b"x"), member("file/x", b"y")],
        "file/x: lies in file, which is a file, expected a directory",
    ),
    "too deep": ([member("d/" * 260 + "x")], f"path {'d/' * 32}...: more than 256 directories deep"),
    "an unknown type": ([member("x", kind=b"Q")], "layer: member x is of type b'Q', which no ramdisk can hold"),
    "a file as the root": ([member("/", b"x")], "layer: a member without a name"),
    "an owner that cannot be": (
        [member("x", uid=1 << 33)],
        "layer: member x has owner 8589934592:0, expected 32-bit numbers",
    ),
    "a long path": ([member("n" * 4090)], f"path {'n' * 64}...: 4090 bytes, expected at most 4088"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    entries, message = REFUSED[name]
    with pytest.raises(SourceError) as caught:
        Layers().apply(BytesIO(tar(entries)), "layer")
    assert caught.value.message == message


def claiming(kind: bytes, size: int) -> bytes:
    """A header that says how long what follows is, and nothing follows."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_descriptions_without_end_are_not_read(kind: bytes) -> None:
    with pytest.raises(SourceError) as caught:
        Layers().apply(BytesIO(claiming(kind, 1 << 40)), "layer")
    assert caught.value.message == "tar: 1099511627776 bytes that describe one member, expected at most 1048576"


def test_a_gnu_sparse_file_is_refused() -> None:
    with pytest.raises(SourceError) as caught:
        Layers().apply(BytesIO(claiming(tarfile.GNUTYPE_SPARSE, 1)), "layer")
    assert caught.value.message == "layer: member x is a sparse file, which no ramdisk can hold"


def test_a_file_that_claims_more_than_there_is() -> None:
    with pytest.raises(SourceError) as caught:
        Layers().apply(BytesIO(claiming(tarfile.REGTYPE, 1 << 50)), "layer")
    assert caught.value.message == "layer: member x is cut off"


def test_a_file_of_4_gib_is_refused_by_the_ramdisk(tmp_path: Path) -> None:
    info = tarfile.TarInfo("large")
    info.size = 1 << 32
    with (tmp_path / "layer").open("w+b") as file:
        file.write(info.tobuf(tarfile.PAX_FORMAT))
        file.seek(info.size + 1024, os.SEEK_CUR)
        file.truncate()
        layers = Layers()
        layers.apply(file, "layer")
        with pytest.raises(SourceError) as caught:
            application_ramdisk(layers.tree, b"")
    assert caught.value.message == ("cpio entry rootfs/large: 4294967296 bytes, at most 4294967295 fit in this format")


def test_of_two_members_with_one_name_the_later_counts() -> None:
    layers = Layers()
    layers.apply(BytesIO(tar([member("a", b"1", mode=0o600), member("a", b"22", mode=0o4755)])), "x")
    node = layers.tree.get(b"a")
    assert node is not None
    assert (node.content.size, node.mode) == (2, stat.S_IFREG | 0o4755)


def test_symlinks_stay_within() -> None:
    layers = Layers()
    layers.apply(
        BytesIO(tar([symlink("up", "../../../.."), symlink("root", "/"), member("up/a"), member("root/b")])), "x"
    )
    assert {b"", b"a", b"b", b"up", b"root"} == {path for path, _ in layers.tree.items()}


def test_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_module, "MAX_NODES", 2)
    with pytest.raises(SourceError) as caught:
        Layers().apply(BytesIO(tar([member("same") for _ in range(5)])), "layer")
    assert caught.value.message == "layer: more than 4 members"
