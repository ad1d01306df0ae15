# SPDX-License-Identifier: Apache-2.0
"""Trees: their order, their bounds, and what cannot lie where."""

from __future__ import annotations

import stat
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.errors import SourceError
from enclavekit.image import tree as tree_module
from enclavekit.image.tree import Node, Tree, normalise, shown

DIRECTORY = Node(stat.S_IFDIR | 0o700, mtime=9)
FILE = Node(stat.S_IFREG | 0o644, mtime=5)


def paths(tree: Tree) -> list[bytes]:
    return [path for path, _ in tree.items()]


def test_order_is_of_bytes_with_parents_first() -> None:
    tree = Tree()
    for path in (b"b", b"a/c", b"a-b", b"\xff", b"a/b/c"):
        tree.add(path, FILE)
    assert paths(tree) == [b"", b"a", b"a-b", b"a/b", b"a/b/c", b"a/c", b"b", b"\xff"]
    assert len(tree) == 8
    assert b"a/b" in tree


def test_missing_parents_and_later_ones() -> None:
    tree = Tree()
    tree.add(b"a/b", FILE)
    parent = tree.get(b"a")
    assert parent is not None
    assert (parent.mode, parent.uid, parent.mtime) == (stat.S_IFDIR | 0o755, 0, 0)
    tree.add(b"a", DIRECTORY)
    assert tree.get(b"a") is DIRECTORY
    assert tree.get(b"a/b") is FILE


def test_hard_links_are_one_node() -> None:
    tree = Tree()
    tree.add(b"a", FILE)
    tree.link(b"b/c", b"a")
    tree.clamp(3)
    assert tree.get(b"a") is tree.get(b"b/c")
    assert tree.newest() == 3


def test_times() -> None:
    tree = Tree()
    tree.add(b"a", FILE)
    tree.add(b"b", DIRECTORY)
    assert tree.newest() == 9
    tree.clamp(7)
    assert [node.mtime for _, node in tree.items()] == [0, 5, 7]


def test_what_cannot_be() -> None:
    tree = Tree()
    tree.add(b"file", FILE)
    tree.add(b"link", Node(stat.S_IFLNK | 0o777))
    tree.add(b"dir", DIRECTORY)
    attempts: list[tuple[Callable[[], None], str]] = [
        (lambda: tree.add(b"file/x", FILE), "file/x: lies in file, which is a file, expected a directory"),
        (lambda: tree.add(b"link/x/y", FILE), "link/x/y: lies in link, which is a symlink, expected a directory"),
        (lambda: tree.add(b"dir", FILE), "dir: a file, but a directory of that name came before"),
        (lambda: tree.link(b"x", b"none"), "x: a hard link to none, which did not come before"),
        (lambda: tree.link(b"x", b"dir"), "x: a hard link to the directory dir"),
        (lambda: tree.add(b"d/" * 256 + b"x", FILE), f"path {'d/' * 32}...: more than 256 directories deep"),
        (lambda: tree.add(b"n" * 4089, FILE), f"path {'n' * 64}...: 4089 bytes, expected at most 4088"),
    ]
    for attempt, message in attempts:
        with pytest.raises(SourceError) as caught:
            attempt()
        assert caught.value.message == message
    assert paths(tree) == [b"", b"dir", b"file", b"link"]


def test_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "MAX_NODES", 3)
    tree = Tree()
    tree.add(b"a", FILE)
    tree.add(b"b", FILE)
    tree.add(b"b", FILE)
    with pytest.raises(SourceError) as caught:
        tree.add(b"c", FILE)
    assert caught.value.message == "c: more than 3 files"


@pytest.mark.parametrize(
    ("name", "path"), [(b"./a//b/", b"a/b"), (b"/etc/passwd", b"etc/passwd"), (b".", b""), (b"a/..b", b"a/..b")]
)
def test_normalise(name: bytes, path: bytes) -> None:
    assert normalise(name) == path


def test_no_way_out() -> None:
    with pytest.raises(SourceError) as caught:
        normalise(b"a/../../etc")
    assert caught.value.message == "a/../../etc: a path with .., expected one that stays inside"
    with pytest.raises(SourceError) as caught:
        normalise(b"a\0b")
    assert caught.value.message == "a\\x00b: a path with a NUL byte"


def test_shown_is_one_printable_line() -> None:
    assert shown(b"a\nb\x1b\xff") == "a\\nb\\x1b\\xff"
    assert shown("é".encode()) == "é"
    assert shown(b"") == "/"


@given(st.lists(st.binary(max_size=6).map(lambda name: name.replace(b"\0", b"")), max_size=8))
def test_a_tree_always_has_the_parents(names: list[bytes]) -> None:
    tree = Tree()
    for name in names:
        try:
            tree.add(normalise(name), DIRECTORY)
        except SourceError as error:
            assert ".." in error.message  # noqa: PT017  # the only reason there can be
    seen: set[bytes] = set()
    for path in paths(tree):
        assert not path or path.rpartition(b"/")[0] in seen
        seen.add(path)
