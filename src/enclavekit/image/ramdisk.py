# SPDX-License-Identifier: Apache-2.0
"""Trees as ramdisks: uncompressed cpio archives of known size, whose data are read while they are written.

The bytes depend on paths, modes, owners, times and data alone: inode numbers are counted, device numbers are 0.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from enclavekit.codec import cpio
from enclavekit.eif import CHUNK_SIZE, BytesContent
from enclavekit.errors import FormatError, SourceError
from enclavekit.image.tree import Node, Tree, shown

ROOT_PREFIX = b"rootfs"
CONFIG_NAME = b"config"
CONFIG_MODE = stat.S_IFREG | 0o600


class Ramdisk:
    """An archive of these nodes, in this order; a Content. The same node twice is a hard link."""

    def __init__(self, nodes: Sequence[tuple[bytes, Node]]) -> None:
        self._nodes = nodes
        try:
            self.size = cpio.archive_size(entry for entry, _ in self._entries())
        except FormatError as error:
            raise SourceError(error.message, hint=error.hint) from error

    def chunks(self) -> Iterator[bytes]:
        """The archive, small pieces joined: a tree can have very many."""
        pieces: list[bytes] = []
        size = 0
        for piece in cpio.archive(self._items()):
            pieces.append(piece)
            size += len(piece)
            if size >= CHUNK_SIZE:
                yield b"".join(pieces)
                pieces, size = [], 0
        yield b"".join(pieces)

    def _items(self) -> Iterator[tuple[cpio.Entry, Iterable[bytes]]]:
        for entry, node in self._entries():
            yield entry, node.content.chunks() if entry.size else ()

    def _entries(self) -> Iterator[tuple[cpio.Entry, Node]]:
        links = Counter(id(node) for _, node in self._nodes)
        seen: Counter[int] = Counter()
        numbers: dict[int, int] = {}
        for name, node in self._nodes:
            seen[id(node)] += 1
            # Linux keeps the last name's data; the names before it have none.
            is_last = seen[id(node)] == links[id(node)]
            entry = cpio.Entry(
                name=name,
                mode=node.mode,
                size=node.content.size if is_last else 0,
                ino=numbers.setdefault(id(node), len(numbers) + 1),
                uid=node.uid,
                gid=node.gid,
                nlink=2 if node.is_directory else links[id(node)],
                mtime=node.mtime,
                rdev=node.rdev,
            )
            if node.is_symlink and not 0 < node.content.size < cpio.MAX_NAME_SIZE:
                size = node.content.size
                raise SourceError(f"{shown(name)}: a symlink to a path of {size} bytes, expected 1 to 4095")
            yield entry, node


def application_ramdisk(tree: Tree, config: bytes) -> Ramdisk:
    """The root file system under ``rootfs/``, and init's configuration beside it."""
    nodes = [(CONFIG_NAME, Node(CONFIG_MODE, content=BytesContent(config)))]
    nodes += [(ROOT_PREFIX + b"/" + path if path else ROOT_PREFIX, node) for path, node in tree.items()]
    return Ramdisk(nodes)
