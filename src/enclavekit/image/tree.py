# SPDX-License-Identifier: Apache-2.0
"""A root filesystem in memory: names, types and owners here, file contents still where they came from.

Nothing is unpacked to disk, so no root is needed and no path can lead out. Paths are tuples of byte names; a source is
hostile, so their number, length and depth are bounded.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from enclavekit.eif import BytesContent, Content
from enclavekit.errors import SourceError

MAX_ENTRIES = 2_000_000
MAX_PATH = 4000
"""Bytes; PATH_MAX less room for a prefix."""
MAX_NAME = 255
MAX_FILE_SIZE = 0xFFFF_FFFF
"""cpio has 32 bits for a file's size."""
MAX_LINKS = 40
"""Symbolic links followed in one look-up, as Linux has it."""

Path = tuple[bytes, ...]
EMPTY = BytesContent(b"")


@dataclass(frozen=True, slots=True)
class Node:
    """One inode. ``mode`` has the type's bits; ``content`` is a file's data or a symlink's target."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    content: Content = EMPTY
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device."""

    @property
    def is_directory(self) -> bool:
        """Whether it may have children."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether its content is a target."""
        return stat.S_ISLNK(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether its content is data."""
        return stat.S_ISREG(self.mode)


@dataclass(slots=True)
class Tree:
    """Paths and nodes; the same node under several paths is a hard link. The root is the empty path."""

    nodes: dict[Path, Node] = field(default_factory=lambda: {(): Node(stat.S_IFDIR | 0o755)})
    newest: int = 0
    """The latest mtime of the source, before clamping."""

    def add(self, path: Path, node: Node) -> None:
        """Put a node in place; missing parents are made, a directory keeps its children."""
        where = show(path)
        if len(b"/".join(path)) > MAX_PATH or any(len(name) > MAX_NAME for name in path):
            raise SourceError(f"{where}: path too long, expected at most {MAX_PATH} bytes, {MAX_NAME} in each name")
        if any(name in (b"", b".", b"..") or b"/" in name or b"\0" in name for name in path):
            raise SourceError(f"{where}: not a plain path")
        if node.is_file and node.content.size > MAX_FILE_SIZE:
            raise SourceError(
                f"{where}: {node.content.size} bytes, expected less than 4 GiB: a ramdisk cannot hold more"
            )
        for depth in range(len(path)):
            parent = self.nodes.get(path[:depth])
            if parent is None:
                self.nodes[path[:depth]] = Node(stat.S_IFDIR | 0o755)
            elif not parent.is_directory:
                raise SourceError(f"{where}: {show(path[:depth])} is not a directory")
        before = self.nodes.get(path)
        if before is not None and before.is_directory and not node.is_directory:
            raise SourceError(f"{where}: stands for a directory and for something else")
        self.nodes[path] = node
        if len(self.nodes) > MAX_ENTRIES:
            raise SourceError(f"more than {MAX_ENTRIES} entries")

    def link(self, path: Path, target: Path) -> None:
        """Make ``path`` another name of what ``target`` is."""
        node = self.nodes.get(target)
        if node is None or node.is_directory:
            raise SourceError(f"{show(path)}: hard link to {show(target)}, which is no file here")
        self.add(path, node)

    def clamp(self, epoch: int) -> None:
        """No mtime later than ``epoch``, seconds since 1970. Hard links stay hard links."""
        clamped: dict[int, Node] = {}
        for path, node in self.nodes.items():
            if node.mtime > epoch:
                if id(node) not in clamped:
                    clamped[id(node)] = replace(node, mtime=epoch)
                self.nodes[path] = clamped[id(node)]

    def sorted(self) -> Iterator[tuple[Path, Node]]:
        """By path, byte by byte, parents first."""
        yield from sorted(self.nodes.items(), key=lambda item: item[0])

    def resolve(self, path: Path) -> Node | None:
        """The node at a path, symbolic links followed within the tree; None where there is none."""
        pending, seen = list(reversed(path)), 0
        node: Node | None = self.nodes[()]
        at: Path = ()
        while pending:
            name = pending.pop()
            if name in (b"", b"."):
                continue
            at = at[:-1] if name == b".." else (*at, name)
            node = self.nodes.get(at)
            if node is None:
                return None
            if node.is_symlink:
                seen += 1
                if seen > MAX_LINKS:
                    return None
                target = b"".join(bytes(chunk) for chunk in node.content.chunks())
                at = () if target.startswith(b"/") else at[:-1]
                pending += reversed(target.split(b"/"))
                node = self.nodes.get(at)
        return node


def show(path: Path) -> str:
    """For messages."""
    return "/" + b"/".join(path).decode(errors="backslashreplace")
