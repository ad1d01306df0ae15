# SPDX-License-Identifier: Apache-2.0
"""Layers of a container image, one applied to another in memory.

Source: OCI image specification, layer.md. A layer is a tar; a name that starts with ``.wh.`` takes away what lower
layers have under the rest of that name, and ``.wh..wh..opq`` all that they have in its directory, wherever it stands in
the tar. Entries replace what is there, but a directory over a directory only changes its attributes. Symlinks above an
entry are followed, with the image's root as theirs, as if the layer were unpacked in a chroot.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import BinaryIO

from enclavekit.errors import SourceError
from enclavekit.image.tar import Member, read_tar
from enclavekit.image.tree import MAX_NODES, Tree, shown

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"


@dataclass(slots=True)
class Layers:
    """The tree so far, and what of the layers it could not hold: ``lost`` counts files by the name of the attribute."""

    tree: Tree = field(default_factory=Tree)
    lost: Counter[str] = field(default_factory=Counter)

    def apply(self, file: BinaryIO, where: str) -> None:
        """Put an uncompressed layer on top; SourceError for one that is broken, or that leads out of the root.

        Its files' contents stay in ``file``. ``where`` names the layer in messages.
        """
        members: list[Member] = []
        for member in read_tar(file, where):
            directory, _, name = member.path.rpartition(b"/")
            if not name.startswith(WHITEOUT):
                if len(members) >= 2 * MAX_NODES:
                    raise SourceError(f"{where}: more than {2 * MAX_NODES} members")
                members.append(member)
            else:
                # What is taken away is of lower layers: this one's own entries come after all of its whiteouts.
                self._white_out(directory, name, where)
        for member in members:
            self._add(member, where)

    def warnings(self) -> list[str]:
        """Sentences about what was lost."""
        return [
            f"extended attribute {name} of {count} files is lost: no ramdisk can hold it"
            for name, count in sorted(self.lost.items())
        ]

    def _white_out(self, directory: bytes, name: bytes, where: str) -> None:
        if name == OPAQUE:
            path = self.tree.resolve(directory + b"/" + name).rpartition(b"/")[0] if directory else b""
            self.tree.clear(path)
            return
        hidden = name.removeprefix(WHITEOUT)
        if hidden in (b"", b".", b".."):
            raise SourceError(f"{where}: whiteout {shown(name)}, expected a name after .wh.")
        if hidden.startswith(WHITEOUT):
            return  # of a union file system's own, .wh..wh.plnk and its like
        path = self.tree.resolve(directory + b"/" + hidden if directory else hidden)
        if path in self.tree:
            self.tree.remove(path)

    def _add(self, member: Member, where: str) -> None:
        path = self.tree.resolve(member.path) if member.path else b""
        self.lost.update(member.xattrs)
        if member.node is not None:
            self.tree.replace(path, member.node)
            return
        target = self.tree.resolve(member.target)
        node = self.tree.get(target)
        if node is None or node.is_directory:
            what = "which is a directory" if node else "which is in no layer up to this one"
            raise SourceError(f"{where}: {shown(path)} is a hard link to {shown(target)}, {what}")
        if target != path:
            self.tree.replace(path, node)
