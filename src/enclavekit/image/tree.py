# SPDX-License-Identifier: Apache-2.0
"""A file system in memory, as a directory, a tar or layers of an image describe one; files' data stay where they are.

Paths are bytes, relative, without ``.``, ``..`` or empty parts; the root is ``b""``. A node that has two paths is a
hard link. The order is that of the paths' bytes, in which a directory comes before what is in it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace

from enclavekit.eif import BytesContent, Content
from enclavekit.errors import SourceError

MAX_PATH_SIZE = 4095 - len(b"rootfs/")
"""The kernel takes names of 4095 bytes, and the root file system gets a prefix in its ramdisk."""
MAX_DEPTH = 256
MAX_NODES = 1 << 20
MAX_SYMLINKS = 40
"""As Linux."""
MAX_TIME = 0xFFFFFFFF
"""cpio's last second, in 2106."""

_EMPTY = BytesContent(b"")
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
}


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A file of any kind; ``mode`` holds type and permissions. A symlink's target is its content."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    content: Content = _EMPTY
    rdev: tuple[int, int] = (0, 0)

    @property
    def is_directory(self) -> bool:
        """Whether other nodes can lie in this one."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether the content is a path."""
        return stat.S_ISLNK(self.mode)

    @property
    def kind(self) -> str:
        """In words."""
        return _KINDS.get(stat.S_IFMT(self.mode), "file of an unknown kind")


class Tree:
    """Nodes by path. What breaks the rules is a SourceError."""

    def __init__(self) -> None:
        self._nodes: dict[bytes, Node] = {b"": Node(stat.S_IFDIR | 0o755)}
        self._names: dict[bytes, set[bytes]] = {b"": set()}
        """Of what lies in each directory."""

    def __contains__(self, path: bytes) -> bool:
        return path in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, path: bytes) -> Node | None:
        """The node at exactly this path: symlinks are not followed."""
        return self._nodes.get(path)

    def items(self) -> Iterator[tuple[bytes, Node]]:
        """All nodes in order, the root first."""
        for path in sorted(self._nodes):
            yield path, self._nodes[path]

    def add(self, path: bytes, node: Node) -> None:
        """Put a node at a path; a later one replaces an earlier one. Missing parents become root's, with mode 0755."""
        if len(path) > MAX_PATH_SIZE:
            raise SourceError(f"path {shown(path[:64])}...: {len(path)} bytes, expected at most {MAX_PATH_SIZE}")
        if path.count(b"/") >= MAX_DEPTH:
            raise SourceError(f"path {shown(path[:64])}...: more than {MAX_DEPTH} directories deep")
        old = self._nodes.get(path)
        if old and old.is_directory and not node.is_directory:
            raise SourceError(f"{shown(path)}: a {node.kind}, but a directory of that name came before")
        self._add_parents(path)
        self._put(path, node)

    def replace(self, path: bytes, node: Node) -> None:
        """Put a node in place of whatever is there; what is in a directory stays only when another one comes."""
        old = self._nodes.get(path)
        if old and not (old.is_directory and node.is_directory):
            self.remove(path)
        self.add(path, node)

    def remove(self, path: bytes) -> None:
        """Take away a node, and all that is below it. The root stays."""
        self.clear(path)
        if path:
            del self._nodes[path]
            parent, _, name = path.rpartition(b"/")
            self._names[parent].discard(name)

    def clear(self, path: bytes) -> None:
        """Take away all that is below a node."""
        below = [path]
        for one in below:
            below += [one + b"/" + name if one else name for name in self._names.get(one, ())]
        for one in below[1:]:
            del self._nodes[one]
            self._names.pop(one, None)
        if path in self._names:
            self._names[path].clear()

    def resolve(self, path: bytes) -> bytes:
        """The path with the symlinks above its last part followed, the tree's root being theirs.

        SourceError for a loop. What is not there is left as it is; the last part is never followed.
        """
        parts = path.split(b"/")[::-1]
        done: list[bytes] = []
        followed = 0
        while len(parts) > 1:
            part = parts.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                del done[-1:]
                continue
            done.append(part)
            node = self._nodes.get(b"/".join(done))
            if node and node.is_symlink:
                followed += 1
                if followed > MAX_SYMLINKS:
                    raise SourceError(f"{shown(path)}: more than {MAX_SYMLINKS} symlinks on the way")
                if node.content.size > MAX_PATH_SIZE:
                    raise SourceError(f"{shown(b'/'.join(done))}: a symlink to a path of {node.content.size} bytes")
                target = b"".join(node.content.chunks())
                del done[0 if target.startswith(b"/") else -1 :]
                parts += target.split(b"/")[::-1]
        return b"/".join([*done, parts[0]])

    def link(self, path: bytes, target: bytes) -> None:
        """Give the node at ``target`` another path."""
        node = self._nodes.get(target)
        if node is None:
            raise SourceError(f"{shown(path)}: a hard link to {shown(target)}, which did not come before")
        if node.is_directory:
            raise SourceError(f"{shown(path)}: a hard link to the directory {shown(target)}")
        self.add(path, node)

    def clamp(self, epoch: int) -> None:
        """Make no node newer than ``epoch``, in seconds since 1970."""
        clamped: dict[int, Node] = {}
        for path, node in self._nodes.items():
            if id(node) not in clamped:
                clamped[id(node)] = replace(node, mtime=epoch) if node.mtime > epoch else node
            self._nodes[path] = clamped[id(node)]

    def newest(self) -> int:
        """The latest time of any node."""
        return max(node.mtime for node in self._nodes.values())

    def _add_parents(self, path: bytes) -> None:
        parent = path.rpartition(b"/")[0]
        missing = []
        while (node := self._nodes.get(parent)) is None:
            missing.append(parent)
            parent = parent.rpartition(b"/")[0]
        if not node.is_directory:
            raise SourceError(f"{shown(path)}: lies in {shown(parent)}, which is a {node.kind}, expected a directory")
        for one in reversed(missing):
            self._put(one, Node(stat.S_IFDIR | 0o755))

    def _put(self, path: bytes, node: Node) -> None:
        if path not in self._nodes and len(self._nodes) >= MAX_NODES:
            raise SourceError(f"{shown(path)}: more than {MAX_NODES} files")
        self._nodes[path] = node
        if node.is_directory:
            self._names.setdefault(path, set())
        if path:
            parent, _, name = path.rpartition(b"/")
            self._names[parent].add(name)


def normalise(name: bytes) -> bytes:
    """A name from an archive as a path of a tree: always relative to the root, never out of it."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise SourceError(f"{shown(name)}: a path with .., expected one that stays inside")
    if b"\0" in name:
        raise SourceError(f"{shown(name)}: a path with a NUL byte")
    return b"/".join(parts)


def shown(path: bytes) -> str:
    """A path for a message: always printable, always one line."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text) or "/"
