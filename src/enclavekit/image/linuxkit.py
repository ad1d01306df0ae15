# SPDX-License-Identifier: Apache-2.0
"""Ramdisks byte for byte as nitro-cli 1.5 has them made, so that the PCRs of images that exist can be matched.

Source: linuxkit 1.5.2 src/cmd/linuxkit/moby (build.go, image.go) with the patches that nitro-cli ships, and the cpio
writer that it uses. Found by running them: every choice here, sensible or not, is theirs. The root file system is what
``docker export`` gives: the layers, and what docker puts into every container.
"""

from __future__ import annotations

import posixpath
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from enclavekit.codec import cpio
from enclavekit.eif import BytesContent, Content
from enclavekit.errors import FormatError, SourceError
from enclavekit.image.tree import Node, Tree, shown

MADE = 1492533000
"""2017-04-18T16:30:00Z, the time of all that linuxkit makes itself."""
FIRST_INODE = 721
DEVICE = (3, 1)
PREFIX = b"rootfs/"

_DROPPED = frozenset({b".dockerenv", b"Dockerfile", b"dev/console", b"dev/pts", b"dev/shm", b"etc/hostname"})
"""By exactly these names; directories end with a slash, so two of them never are."""
_TIME_FIXED = frozenset({b"dev/", b"dev/pts/", b"dev/shm/", b"etc/", b"etc/mtab", b"proc/", b"sys/"})
_HOSTS = (
    b"127.0.0.1       localhost\n::1     localhost ip6-localhost ip6-loopback\nfe00::0 ip6-localnet\n"
    b"ff00::0 ip6-mcastprefix\nff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n"
)
_RESOLV_CONF = b"/run/resolvconf/resolv.conf"
_MTAB = b"/proc/mounts"

_DIRECTORY, _FILE, _SYMLINK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK
_DEFAULTS: Sequence[tuple[bytes, int, bytes]] = (
    # what is made when the image has none: name with the slash that the image's would have, mode, content
    (b"dev/", _DIRECTORY, b""),
    (b"dev/pts/", _DIRECTORY, b""),
    (b"dev/shm/", _DIRECTORY, b""),
    (b"etc/", _DIRECTORY, b""),
    (b"etc/hosts", _FILE, _HOSTS),
    (b"etc/mtab", _SYMLINK | 0o755, _MTAB),
    (b"etc/resolv.conf", _SYMLINK | 0o644, _RESOLV_CONF),
    (b"proc/", _DIRECTORY, b""),
    (b"sys/", _DIRECTORY, b""),
)
_AGAIN = (b"", b"/dev", b"/run", b"/sys", b"/var", b"/proc", b"/tmp")

Named = tuple[bytes, Node]


@dataclass(frozen=True, slots=True)
class LinuxkitRamdisk:
    """An archive of these nodes, in this order; a Content. Times and modes are theirs."""

    nodes: Sequence[Named]
    size: int

    @classmethod
    def of(cls, nodes: Iterable[Named]) -> LinuxkitRamdisk:
        """SourceError for what the format cannot hold."""
        kept = tuple(nodes)
        try:
            size = sum(len(bytes(entry)) + entry.size + -entry.size % 4 for entry, _ in _entries(kept))
        except FormatError as error:
            raise SourceError(error.message, hint=error.hint) from error
        return cls(kept, size + -size % cpio.BLOCK_SIZE)

    def chunks(self) -> Iterator[bytes]:
        """The archive's bytes."""
        written = 0
        for entry, content in _entries(self.nodes):
            yield bytes(entry)
            size = 0
            for chunk in content.chunks() if entry.size else ():
                size += len(chunk)
                yield chunk
            if size != entry.size:
                raise SourceError(f"{shown(entry.name)}: {size} bytes, expected {entry.size}")
            yield bytes(-size % 4)
            written += len(bytes(entry)) + size + -size % 4
        yield bytes(-written % cpio.BLOCK_SIZE)


def bootstrap_ramdisk(init: Content, nsm: Content) -> LinuxkitRamdisk:
    """The first ramdisk: ``dev``, ``init`` and ``nsm.ko``."""
    program = stat.S_IFREG | 0o755
    return LinuxkitRamdisk.of(
        [
            (b"dev", Node(_DIRECTORY, mtime=MADE)),
            (b"init", Node(program, mtime=MADE, content=init)),
            (b"nsm.ko", Node(program, mtime=MADE, content=nsm)),
        ]
    )


def customer_ramdisk(root: Iterable[Named], command: Sequence[bytes], environment: Sequence[bytes]) -> LinuxkitRamdisk:
    """The second ramdisk: the root file system under ``rootfs/``, and the files ``cmd`` and ``env``.

    ``root`` has the entries of ``docker export``, in its order: names of directories end with a slash; the same node a
    second time is a hard link, which becomes a symlink.
    """
    nodes: list[Named] = [(b"rootfs", Node(_DIRECTORY, mtime=MADE))]
    met: set[bytes] = set()
    first: dict[int, bytes] = {}
    for name, node in root:
        met.add(name)
        if name not in _DROPPED:
            nodes.append((PREFIX + name, _changed(name, node, first)))
    for name, mode, data in _DEFAULTS:
        if name not in met:
            nodes.append((PREFIX + name.rstrip(b"/"), Node(mode, mtime=MADE, content=BytesContent(data))))
    nodes += [(b"rootfs" + name, Node(_DIRECTORY, mtime=MADE)) for name in _AGAIN]
    for name, lines in ((b"cmd", command), (b"env", environment)):
        content = BytesContent(b"".join(line + b"\n" for line in lines))
        nodes.append((name, Node(_FILE, mtime=MADE, content=content)))
    return LinuxkitRamdisk.of(nodes)


def exported(tree: Tree) -> Iterator[Named]:
    """A container's root file system as ``docker export`` walks it: each directory's names sorted, then below each.

    With what docker puts into every container when the image lacks it.
    """
    made = dict(tree.items())
    for name, mode, target in (
        (b".dockerenv", stat.S_IFREG | 0o755, b""),
        (b"dev", _DIRECTORY, b""),
        (b"dev/console", stat.S_IFREG | 0o755, b""),
        (b"dev/pts", _DIRECTORY, b""),
        (b"dev/shm", _DIRECTORY, b""),
        (b"etc", _DIRECTORY, b""),
        (b"etc/hostname", stat.S_IFREG | 0o755, b""),
        (b"etc/hosts", stat.S_IFREG | 0o755, b""),
        (b"etc/mtab", _SYMLINK | 0o777, _MTAB),
        (b"etc/resolv.conf", stat.S_IFREG | 0o755, b""),
        (b"proc", _DIRECTORY, b""),
        (b"sys", _DIRECTORY, b""),
    ):
        made.setdefault(name, Node(mode, mtime=MADE, content=BytesContent(target)))
    for path in sorted((path for path in made if path), key=lambda path: path.split(b"/")):
        yield (path + b"/" if made[path].is_directory else path), made[path]


def _changed(name: bytes, node: Node, first: dict[int, bytes]) -> Node:
    """What linuxkit makes of an entry."""
    if name == b"etc/hosts":
        return replace(node, mtime=MADE, content=BytesContent(_HOSTS))
    if name == b"etc/resolv.conf":
        mode = _SYMLINK | stat.S_IMODE(node.mode)
        return replace(node, mode=mode, mtime=MADE, content=BytesContent(_RESOLV_CONF))
    if name in _TIME_FIXED:
        return replace(node, mtime=MADE)
    if stat.S_ISREG(node.mode):
        target = first.setdefault(id(node), name)
        if target != name:
            relative = posixpath.relpath(PREFIX + target, posixpath.dirname(PREFIX + name))
            return replace(node, mode=_SYMLINK | stat.S_IMODE(node.mode), content=BytesContent(relative))
    return node


def _entries(nodes: Sequence[Named]) -> Iterator[tuple[cpio.Entry, Content]]:
    """Numbered from 721, the trailer too."""
    for number, (name, node) in enumerate(nodes, FIRST_INODE):
        entry = cpio.Entry(
            name=name,
            mode=node.mode,
            size=node.content.size,
            ino=number,
            uid=node.uid,
            gid=node.gid,
            nlink=2 if node.is_directory else 1,
            mtime=node.mtime,
            dev=DEVICE,
            rdev=node.rdev,
        )
        yield entry, node.content
    yield cpio.Entry(cpio.TRAILER, 0, ino=FIRST_INODE + len(nodes), dev=DEVICE), BytesContent(b"")
