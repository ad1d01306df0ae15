# SPDX-License-Identifier: Apache-2.0
"""Root file systems from a directory, a tar or a container image, as trees: contents are read when they are needed.

Directories: symlinks are never followed, and whoever owns a file here, root owns it in the image, unless the owners are
to be kept. A file that is not what it was when it was listed is an error, never half of it in an image. Tars: owners as
they are; plain, gzip, bzip2, xz or zstd. Extended attributes, and so file capabilities, are not carried: cpio has no
place for them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, cast

from enclavekit.eif import BytesContent, FileContent
from enclavekit.errors import FileError, SourceError
from enclavekit.image.container import ContainerImage, Report, read_layers
from enclavekit.image.layer_cache import LayerCache
from enclavekit.image.tar import plain, read_tar
from enclavekit.image.tree import MAX_TIME, Node, Tree, shown


@dataclass(slots=True)
class Source:
    """A tree and what is needed to read its contents; close it when the image is made.

    ``container`` is the container image that it comes from. ``default_epoch``, seconds since 1970, is what no file is
    newer than when nothing else is said; None: its newest file's time.
    """

    tree: Tree
    warnings: list[str] = field(default_factory=list)
    files: ExitStack = field(default_factory=ExitStack)
    container: ContainerImage | None = None
    default_epoch: int | None = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.files.close()


@dataclass(frozen=True, slots=True)
class _DirectoryFile:
    """A file as it was listed. Device, inode, size and time tell whether it is still the same."""

    path: bytes
    identity: tuple[int, int, int, int]

    @property
    def size(self) -> int:
        return self.identity[2]

    def chunks(self) -> Iterator[bytes]:
        try:
            # Non-blocking: what has become a fifo must not hold us.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise FileError.of(error, shown(self.path), "read") from error
        with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123  # a descriptor, not a path
            self._check(os.fstat(descriptor))
            yield from FileContent(cast(BinaryIO, file), 0, self.size, shown(self.path)).chunks()
            self._check(os.fstat(descriptor))

    def _check(self, now: os.stat_result) -> None:
        if _identity(now) != self.identity:
            raise SourceError(f"{shown(self.path)}: changed while the image was made")


def open_directory(directory: Path, *, keep_owners: bool = False) -> Source:
    """The tree under a directory. Sockets have no meaning in an image: they are left out, with a warning."""
    source = Source(Tree())
    top = os.fsencode(directory)
    inodes: dict[tuple[int, int], bytes] = {}
    try:
        status = os.stat(top)  # noqa: PTH116  # bytes, not a path
        if not stat.S_ISDIR(status.st_mode):
            raise SourceError(f"{shown(top)}: expected a directory")
        source.tree.add(b"", _node(status, top, keep_owners))
        pending = [b""]
        while pending:
            parent = pending.pop()
            with os.scandir(os.path.join(top, parent)) as entries:  # noqa: PTH118
                for entry in sorted(entries, key=lambda entry: entry.name):
                    path = parent + b"/" + entry.name if parent else entry.name
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISSOCK(status.st_mode):
                        source.warnings.append(f"{shown(path)}: a socket, left out")
                        continue
                    if stat.S_ISDIR(status.st_mode):
                        pending.append(path)
                    elif status.st_nlink > 1:
                        first = inodes.setdefault((status.st_dev, status.st_ino), path)
                        if first != path:
                            source.tree.link(path, first)
                            continue
                    source.tree.add(path, _node(status, entry.path, keep_owners))
    except OSError as error:
        raise FileError.of(error, shown(os.fsencode(error.filename or top)), "read") from error
    return source


def open_tar(path: Path, *, scratch: Path | None = None) -> Source:
    """The tree in a tar. A compressed one is unpacked to an unnamed file in ``scratch``, by default the system's."""
    source = Source(Tree(), default_epoch=None)
    with ExitStack() as files:
        try:
            file = files.enter_context(path.open("rb"))
        except OSError as error:
            raise FileError.of(error, path, "read") from error
        opened = plain(file, str(path), scratch)
        if opened is not file:
            files.enter_context(opened)
        for member in read_tar(opened, str(path)):
            if member.node is None:
                source.tree.link(member.path, member.target)
            else:
                source.tree.add(member.path, member.node)
        source.files = files.pop_all()
    return source


def open_container(
    find: Callable[[ExitStack], ContainerImage], cache: LayerCache, report: Report = lambda name, done, size: None
) -> Source:
    """The tree of a container image, which ``find`` finds; what it opens stays open with the source."""
    with ExitStack() as files:
        image = find(files)
        tree, warnings = read_layers(image, cache, files, report)
        return Source(tree, warnings, files.pop_all(), image, image.config.created)


def _node(status: os.stat_result, path: bytes, keep_owners: bool) -> Node:
    mode = status.st_mode
    content: BytesContent | _DirectoryFile = BytesContent(b"")
    if stat.S_ISREG(mode):
        content = _DirectoryFile(path, _identity(status))
    elif stat.S_ISLNK(mode):
        content = BytesContent(os.readlink(path))  # noqa: PTH115  # bytes, not a path
    is_device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
    return Node(
        mode=mode,
        uid=status.st_uid if keep_owners else 0,
        gid=status.st_gid if keep_owners else 0,
        mtime=_time(status.st_mtime_ns // 1_000_000_000),
        content=content,
        rdev=(os.major(status.st_rdev), os.minor(status.st_rdev)) if is_device else (0, 0),
    )


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _time(seconds: float) -> int:
    return int(min(max(seconds, 0), MAX_TIME))
