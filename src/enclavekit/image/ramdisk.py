# SPDX-License-Identifier: Apache-2.0
"""Ramdisks: a tree as an uncompressed cpio archive whose size is known before a byte of it is written."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass

from enclavekit.codec import cpio
from enclavekit.codec.init_config import InitConfig
from enclavekit.eif import BytesContent, Content
from enclavekit.errors import SourceError
from enclavekit.image.tree import Node, Path, Tree, show

ROOTFS = b"rootfs"
CONFIG = b"config"


@dataclass(frozen=True, slots=True)
class Ramdisk:
    """A cpio archive as an EIF section's content."""

    entries: tuple[tuple[cpio.Entry, Content], ...]
    size: int

    @classmethod
    def of(cls, tree: Tree) -> Ramdisk:
        """All of a tree, sorted; inode numbers count from 1, so that the same tree gives the same bytes anywhere."""
        names: dict[int, int] = {}
        for _, node in tree.sorted():
            names[id(node)] = names.get(id(node), 0) + 1
        left = dict(names)
        numbers: dict[int, int] = {}
        entries: list[tuple[cpio.Entry, Content]] = []
        for path, node in tree.sorted():
            if not path:
                continue
            left[id(node)] -= 1
            number = numbers.setdefault(id(node), len(numbers) + 1)
            # Linux takes a hard-linked file's data from the last of its names.
            has_data = not node.is_file or left[id(node)] == 0
            content = node.content if has_data else BytesContent(b"")
            entries.append((_entry(path, node, number, names[id(node)], content.size), content))
        return cls(tuple(entries), cpio.archive_size(entry for entry, _ in entries))

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The archive. A file that is not as long as it was is an error."""
        yield from cpio.archive((entry, content.chunks()) for entry, content in self.entries)


def _entry(path: Path, node: Node, number: int, names: int, size: int) -> cpio.Entry:
    if not 0 <= node.uid <= cpio.MAX_FIELD or not 0 <= node.gid <= cpio.MAX_FIELD:
        raise SourceError(f"{show(path)}: owner {node.uid}:{node.gid}, expected 32 bits each")
    return cpio.Entry(
        name=b"/".join(path),
        mode=node.mode,
        ino=number,
        uid=node.uid,
        gid=node.gid,
        nlink=2 if node.is_directory else names,
        mtime=node.mtime,
        size=size,
        rdev=node.device,
    )


def application_ramdisk(root: Tree, config: InitConfig) -> Ramdisk:
    """``rootfs/`` with the image's files, and ``config`` for init beside it."""
    tree = Tree()
    tree.nodes.update({(ROOTFS, *path): node for path, node in root.nodes.items()})
    tree.add((CONFIG,), Node(stat.S_IFREG | 0o600, content=BytesContent(config.encode())))
    return Ramdisk.of(tree)


def boot_ramdisk(init: bytes, modules: list[tuple[str, bytes]]) -> Ramdisk:
    """``/init``, a console for the kernel to give it, and modules in the order in which they are to be loaded."""
    tree = Tree()
    tree.add((b"dev",), Node(stat.S_IFDIR | 0o755))
    tree.add((b"dev", b"console"), Node(stat.S_IFCHR | 0o600, device=(5, 1)))
    tree.add((b"init",), Node(stat.S_IFREG | 0o755, content=BytesContent(init)))
    for number, (name, data) in enumerate(modules):
        tree.add(
            (b"modules", b"%02d-%s.ko" % (number, name.encode())),
            Node(stat.S_IFREG | 0o644, content=BytesContent(data)),
        )
    return Ramdisk.of(tree)
