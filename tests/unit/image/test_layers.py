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
    "many files": [[member(f"d{number % 10}/f{number}", b"%d" % number) for number in range(2000)]],
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
