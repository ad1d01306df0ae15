# SPDX-License-Identifier: Apache-2.0
"""Root file systems from a directory or a tar, as trees whose contents are read when they are needed.

Directories: symlinks are never followed, and whoever owns a file here, root owns it in the image, unless the owners are
to be kept. A file that is not what it was when it was listed is an error, never half of it in an image. Tars: owners as
they are; plain, gzip, bzip2 or xz. Extended attributes, and so file capabilities, are not carried: cpio has no place
for them.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO, Self, cast

from enclavekit.eif import CHUNK_SIZE, BytesContent, FileContent
from enclavekit.errors import FileError, SourceError
from enclavekit.image.tree import MAX_TIME, Node, Tree, normalise, shown

MAX_TAR_SIZE = 1 << 40
"""Of a decompressed tar. The disk ends before; this ends what is endless."""

_BLOCK = 512
_DECOMPRESSORS: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": lambda file: cast(IO[bytes], gzip.GzipFile(fileobj=file)),
    b"\xfd7zXZ\0": lambda file: cast(IO[bytes], lzma.LZMAFile(file)),  # noqa: SIM115
    b"BZh": lambda file: cast(IO[bytes], bz2.BZ2File(file)),
}
_ZSTD = b"\x28\xb5\x2f\xfd"
# What tarfile raises for bad bytes, besides its own errors: it was not written for hostile ones.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, LookupError, MemoryError)


@dataclass(slots=True)
class Source:
    """A tree and what is needed to read its contents; close it when the image is made."""

    tree: Tree
    warnings: list[str] = field(default_factory=list)
    file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file:
            self.file.close()


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
    file: IO[bytes] | None = None
    try:
        file = path.open("rb")
        source = Source(Tree(), file=_plain(file, path, scratch))
    except OSError as error:
        if file:
            file.close()
        raise FileError.of(error, path, "read") from error
    except BaseException:
        if file:
            file.close()
        raise
    if source.file is not file:
        file.close()
    try:
        _read_tar(source.tree, cast(BinaryIO, source.file), path)
    except BaseException:
        source.__exit__(None, None, None)
        raise
    return source


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


def _plain(file: IO[bytes], path: Path, scratch: Path | None) -> IO[bytes]:
    """The tar itself, or what it holds when it is compressed."""
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(_ZSTD):
        raise SourceError(
            f"{path}: compressed with zstd, expected gzip, bzip2, xz or none", hint="unpack it with zstd -d"
        )
    opener = next((opener for start, opener in _DECOMPRESSORS.items() if magic.startswith(start)), None)
    if opener is None:
        return file
    try:
        out = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  # kept open by the source
    except OSError as error:
        raise FileError.of(error, scratch or tempfile.gettempdir(), "make a temporary file in") from error
    try:
        _unpack(opener(file), out, path)
    except BaseException:
        out.close()
        raise
    return out


def _unpack(compressed: IO[bytes], out: IO[bytes], path: Path) -> None:
    with compressed:
        size = 0
        while True:
            try:
                chunk = compressed.read(CHUNK_SIZE)
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ValueError, MemoryError) as error:
                raise SourceError(f"{path}: broken compressed data: {str(error).lower()}") from error
            except OSError as error:
                if error.errno is None:  # bz2's word for bad data
                    raise SourceError(f"{path}: broken compressed data: {str(error).lower()}") from error
                raise
            if not chunk:
                break
            size += len(chunk)
            if size > MAX_TAR_SIZE:
                raise SourceError(f"{path}: unpacks to more than {MAX_TAR_SIZE} bytes")
            try:
                out.write(chunk)
            except OSError as error:
                raise FileError.of(error, path, "unpack") from error
    try:
        out.flush()
    except OSError as error:
        raise FileError.of(error, path, "unpack") from error


def _read_tar(tree: Tree, file: BinaryIO, path: Path) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if tar.offset < member.offset_data:
                    raise SourceError(f"{path}: member at offset 0x{member.offset:x} has a negative size")
                _add_member(tree, member, file, path, size)
            end = tar.offset
    except _TAR_ERRORS as error:
        raise SourceError(f"{path}: not a tar, or a broken one: {str(error).lower()}") from error
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    # tarfile takes a broken header for the end. The true end is a block of zeros.
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise SourceError(f"{path}: no end of the archive at offset 0x{end:x}: broken, or cut off")


def _add_member(tree: Tree, member: tarfile.TarInfo, file: BinaryIO, path: Path, size: int) -> None:
    name = normalise(member.name.encode("utf-8", "surrogateescape"))
    target = member.linkname.encode("utf-8", "surrogateescape")
    if member.type == tarfile.LNKTYPE:
        tree.link(name, normalise(target))
        return
    kind = _TAR_KINDS.get(member.type)
    if kind is None or member.issparse():
        what = "a sparse file" if member.issparse() else f"of type {member.type!r}"
        raise SourceError(f"{path}: member {shown(name)} is {what}, which no ramdisk can hold")
    content: BytesContent | FileContent = BytesContent(b"")
    if kind == stat.S_IFREG:
        if not 0 <= member.size <= size - member.offset_data:
            raise SourceError(f"{path}: member {shown(name)} is cut off")
        content = FileContent(file, member.offset_data, member.size, f"{path} ({shown(name)})")
    elif kind == stat.S_IFLNK:
        content = BytesContent(target)
    if not name and kind != stat.S_IFDIR:
        raise SourceError(f"{path}: a member without a name")
    is_device = kind in (stat.S_IFCHR, stat.S_IFBLK)
    node = Node(
        mode=kind | stat.S_IMODE(member.mode),
        uid=member.uid,
        gid=member.gid,
        mtime=_time(member.mtime),
        content=content,
        rdev=(member.devmajor, member.devminor) if is_device else (0, 0),
    )
    if not (0 <= node.uid <= 0xFFFFFFFE and 0 <= node.gid <= 0xFFFFFFFE):
        raise SourceError(f"{path}: member {shown(name)} has owner {node.uid}:{node.gid}, expected 32-bit numbers")
    tree.add(name, node)


_TAR_KINDS = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.CONTTYPE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}
