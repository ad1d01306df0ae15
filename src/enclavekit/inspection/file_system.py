# SPDX-License-Identifier: Apache-2.0
"""The file system that a kernel makes of an image's ramdisks, one after the other, and looking files up in it.

Source: linux init/initramfs.c (do_name, maybe_link, clean_path), usr/default_cpio_list, fs/namei.c. Later entries
replace earlier ones, parents must exist, symlinks in parents are followed. What cannot be made is left out silently.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from enclavekit.eif import FileContent
from enclavekit.errors import FileError
from enclavekit.image.initramfs import Ramdisk, RamdiskFile

MAX_SYMLINKS = 40
"""Followed in one lookup; the kernel's own limit."""
MAX_PATH_SIZE = 4096
MAX_STEPS = 1024
"""Names gone through in one lookup, those of symlinks too. A kernel has no such limit; real paths are far shorter."""
MAX_DEPTH = 256
MAX_REMARKS = 1000
"""How many replaced and dropped files are told apart; more are only counted."""


class PathError(Exception):
    """A path that leads nowhere; it says why. It never leaves this package."""


class CoveredError(PathError):
    """A path into a file system that init mounts: nothing is known of what will be there."""


class Node:
    """A file of any kind. ``ramdisk`` counts from 0, and is None for what the kernel brings itself."""

    __slots__ = ("children", "content", "gid", "mode", "parent", "ramdisk", "uid")

    def __init__(self, mode: int, parent: Node | None, ramdisk: int | None = None) -> None:
        self.mode = mode
        self.uid = self.gid = 0
        self.content: FileContent | None = None
        self.ramdisk = ramdisk
        self.parent = parent or self
        self.children: dict[bytes, Node] | None = {} if stat.S_ISDIR(mode) else None

    def put(self, name: bytes, node: Node) -> None:
        """Give this directory a child."""
        if self.children is None:
            raise ValueError("not a directory")
        self.children[name] = node

    @property
    def is_directory(self) -> bool:
        """Whether others can lie in it."""
        return self.children is not None

    @property
    def is_file(self) -> bool:
        """Whether it is a regular one."""
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether its content is a path."""
        return stat.S_ISLNK(self.mode)

    @property
    def size(self) -> int:
        """Of the content, in bytes."""
        return self.content.size if self.content else 0

    def read_at(self, offset: int, size: int) -> bytes:
        """Some of the content, less at its end; FileError when it cannot be had."""
        content = self.content
        if content is None or offset >= content.size:
            return b""
        size = min(size, content.size - offset)
        try:
            return os.pread(content.file.fileno(), size, content.offset + offset)
        except OSError as error:
            raise FileError.of(error, content.name, "read") from error

    def may_execute(self, uid: int, groups: frozenset[int]) -> bool:
        """Whether the permissions let such a user execute it."""
        if uid == 0:
            return bool(self.mode & 0o111)
        if uid == self.uid:
            return bool(self.mode & 0o100)
        return bool(self.mode & (0o010 if self.gid in groups else 0o001))


@dataclass(frozen=True, slots=True)
class Replaced:
    """A file of ramdisk ``first`` that ramdisk ``second`` replaces."""

    path: bytes
    first: int
    second: int


class FileSystem:
    """Starts with what a kernel brings; ``merge`` adds ramdisks in their order."""

    def __init__(self) -> None:
        self.root = Node(stat.S_IFDIR | 0o755, None)
        self.replaced: list[Replaced] = []
        self.dropped: list[tuple[bytes, int, str]] = []
        """Path, ramdisk, and why."""
        for name, mode in ((b"dev", stat.S_IFDIR | 0o755), (b"root", stat.S_IFDIR | 0o700)):
            self.root.put(name, Node(mode, self.root))

    def merge(self, index: int, ramdisk: Ramdisk) -> None:
        """Unpack a ramdisk over what is there."""
        for archive in ramdisk.archives:
            links: dict[tuple[int, int, int, int], Node] = {}
            for file in archive.files:
                try:
                    self._make(index, file, links)
                except PathError as error:
                    if len(self.dropped) < MAX_REMARKS:
                        self.dropped.append((file.entry.name, index, str(error)))

    def walk(self, start: Node | None = None) -> Iterator[tuple[bytes, Node]]:
        """Every node below ``start``, or the root, with its path from there; directories before what is in them."""
        stack = [(b"", start or self.root)]
        while stack:
            prefix, directory = stack.pop()
            for name, node in (directory.children or {}).items():
                path = prefix + name
                yield path, node
                # Deeper ones exist in hostile images only, where their paths would fill the memory.
                if node.is_directory and path.count(b"/") < MAX_DEPTH:
                    stack.append((path + b"/", node))

    def _make(self, index: int, file: RamdiskFile, links: dict[tuple[int, int, int, int], Node]) -> None:
        entry = file.entry
        kind = stat.S_IFMT(entry.mode)
        is_link, has_data = kind == stat.S_IFLNK, kind in (stat.S_IFREG, stat.S_IFLNK)
        if (entry.size and not has_data) or (is_link and entry.size > MAX_PATH_SIZE):
            raise PathError(f"a {kind_name(entry.mode)} with {entry.size} bytes of data")
        parent, name = find_parent(self.root, entry.name)
        if not name:
            return
        old = (parent.children or {}).get(name)
        if old and old.is_symlink and entry.name.endswith(b"/"):
            old = find(self.root, entry.name)  # a name with a slash means what the symlink leads to
        both_directories = old is not None and old.is_directory and kind == stat.S_IFDIR
        if old and old.ramdisk not in (None, index) and not both_directories and len(self.replaced) < MAX_REMARKS:
            self.replaced.append(Replaced(entry.name, old.ramdisk or 0, index))
        if (old and stat.S_IFMT(old.mode) != kind) or is_link:
            if old and old.children:
                raise PathError(f"a {kind_name(entry.mode)} in place of a directory that is not empty")
            old = None
        key = (*entry.dev, entry.ino, kind)
        linked = links.get(key) if entry.nlink > 1 and not is_link and kind != stat.S_IFDIR else None
        node = linked or old or Node(entry.mode, parent, index)
        if old is not node and (linked or old is None):
            parent.put(name, node)
        if entry.nlink > 1 and linked is None:
            links[key] = node
        node.mode, node.uid, node.gid, node.ramdisk = entry.mode, entry.uid, entry.gid, index
        # Of a hard link's names the last one has the data; before that an empty one takes nothing away.
        if has_data and (entry.size or not linked):
            node.content = file.content


def find(root: Node, path: bytes, *, start: Node | None = None, covered: frozenset[bytes] = frozenset()) -> Node:
    """The node that a path leads to, symlinks followed, as for a process whose root is ``root``.

    ``start`` is where relative paths begin. Below the names in ``covered``, in the root, nothing can be known.
    Raises PathError.
    """
    return _Walk(root, covered).run(path, start or root)


def find_parent(root: Node, path: bytes) -> tuple[Node, bytes]:
    """The directory that a path's last name lies in, symlinks followed, and that name; no name for the root itself."""
    path = path.rstrip(b"/")
    head, _, name = path.rpartition(b"/")
    if name in (b"", b".", b".."):
        find(root, path)
        return root, b""
    parent = find(root, head)
    if not parent.is_directory:
        raise PathError(f"/{shown(head)} is a {kind_name(parent.mode)}")
    return parent, name


class _Walk:
    """One lookup."""

    def __init__(self, root: Node, covered: frozenset[bytes]) -> None:
        self._root = root
        self._covered = covered
        self._symlinks = 0

    def run(self, path: bytes, start: Node) -> Node:
        if len(path) >= MAX_PATH_SIZE:
            raise PathError("the path is too long")
        node = self._root if path.startswith(b"/") else start
        steps = 0
        parts = [part for part in reversed(path.split(b"/")) if part not in (b"", b".")]
        while parts:
            part = parts.pop()
            steps += 1
            if steps + len(parts) > MAX_STEPS:
                raise PathError(f"more than {MAX_STEPS} directories deep")
            if not node.is_directory:
                raise PathError(f"a {kind_name(node.mode)} stands where a directory should")
            if node is self._root and part in self._covered and parts:
                raise CoveredError(f"init mounts something on /{shown(part)}")
            if part == b"..":
                node = node if node is self._root else node.parent
                continue
            child = (node.children or {}).get(part)
            if child is None:
                raise PathError(f"no {shown(part)}")
            if child.is_symlink:
                target = self._follow(child)
                parts += [one for one in reversed(target.split(b"/")) if one not in (b"", b".")]
                node = self._root if target.startswith(b"/") else node
            else:
                node = child
        return node

    def _follow(self, symlink: Node) -> bytes:
        self._symlinks += 1
        if self._symlinks > MAX_SYMLINKS:
            raise PathError(f"more than {MAX_SYMLINKS} symlinks")
        target = symlink.read_at(0, MAX_PATH_SIZE).partition(b"\0")[0]
        if not target:
            raise PathError("a symlink to nothing")
        return target


def kind_name(mode: int) -> str:
    """A file's kind in words."""
    kinds = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "directory",
        stat.S_IFLNK: "symlink",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
        stat.S_IFIFO: "fifo",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "file of an unknown kind")


def shown(path: bytes) -> str:
    """A path for a message: always printable, always one line, never too long."""
    text = path[:200].decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
