# SPDX-License-Identifier: Apache-2.0
"""Where a root filesystem comes from: a directory or a tar file, each read into a ``Tree``."""

from __future__ import annotations

import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from enclavekit.eif import BytesContent
from enclavekit.errors import FileError, SourceError, UsageError
from enclavekit.image.tree import Node, Tree, show
from enclavekit.image.tree import Path as TreePath

CHUNK = 1 << 18
MAX_UNCOMPRESSED = 16 << 30
"""Bytes of a tar file after decompression: no enclave holds more."""
MAX_TIME = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Slice:
    """A file's data as a part of an open file, which lives as long as the tree."""

    file: IO[bytes]
    offset: int
    size: int
    name: str

    def chunks(self) -> Iterator[bytes]:
        """Read it; any number of readers may."""
        offset, end = self.offset, self.offset + self.size
        while offset < end:
            try:
                data = os.pread(self.file.fileno(), min(CHUNK, end - offset), offset)
            except OSError as error:
                raise FileError.of(error, self.name, "read") from error
            if not data:
                raise SourceError(f"{self.name}: ends at offset {offset}, expected {end}")
            yield data
            offset += len(data)


@dataclass(frozen=True, slots=True)
class DirectoryFile:
    """A file's data in a source directory; its size must stay what it was."""

    path: bytes
    size: int

    def chunks(self) -> Iterator[bytes]:
        """Read it, never through a symlink that took its place."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(fd, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor
                while data := file.read(CHUNK):
                    yield data
        except OSError as error:
            raise FileError.of(error, os.fsdecode(self.path), "read") from error


@dataclass(frozen=True, slots=True)
class Source:
    """``dir:DIR`` or ``tar:FILE``."""

    kind: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> Source:
        """Errors: ``UsageError``."""
        kind, colon, path = text.partition(":")
        if not colon or kind not in ("dir", "tar") or not path:
            raise UsageError(f"source {text!r}: expected dir:DIR or tar:FILE", hint="for instance dir:rootfs")
        return cls(kind, Path(path))

    @property
    def name(self) -> str:
        """What an image made of it is called."""
        name = self.path.resolve().name if self.kind == "dir" else self.path.name
        return name.split(".tar")[0] or "image"

    def load(self, *, keep_owners: bool = False) -> Tree:
        """Names and attributes; contents are read when they are written. Errors: ``SourceError``, ``FileError``."""
        if self.kind == "dir":
            return load_directory(self.path, keep_owners=keep_owners)
        return load_tar(self.path)


def load_directory(root: Path, *, keep_owners: bool = False) -> Tree:
    """A directory as it is; owners become 0:0, so that anyone gets the same bytes, unless they are to be kept."""
    tree = Tree()
    linked: dict[tuple[int, int], TreePath] = {}

    def visit(directory: bytes, path: TreePath) -> None:
        try:
            with os.scandir(directory) as found:
                names = sorted(entry.name for entry in found)
        except OSError as error:
            raise FileError.of(error, os.fsdecode(directory), "read") from error
        for name in names:
            add(os.path.join(directory, name), (*path, name))  # noqa: PTH118 - bytes

    def add(file: bytes, path: TreePath) -> None:
        try:
            status = os.lstat(file)
            target = os.readlink(file) if stat.S_ISLNK(status.st_mode) else b""  # noqa: PTH115 - bytes
        except OSError as error:
            raise FileError.of(error, os.fsdecode(file), "read") from error
        if stat.S_ISSOCK(status.st_mode):
            raise SourceError(f"{show(path)}: a socket, which no ramdisk can hold", hint="remove it from the directory")
        identity = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            if identity in linked:
                tree.link(path, linked[identity])
                return
            linked[identity] = path
        mtime = min(max(int(status.st_mtime), 0), MAX_TIME)
        tree.newest = max(tree.newest, mtime)
        is_device = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
        node = Node(
            mode=stat.S_IFLNK | 0o777 if target else status.st_mode,
            uid=status.st_uid if keep_owners else 0,
            gid=status.st_gid if keep_owners else 0,
            mtime=mtime,
            content=BytesContent(target) if target or not stat.S_ISREG(status.st_mode)
            else DirectoryFile(file, status.st_size),
            device=(os.major(status.st_rdev), os.minor(status.st_rdev)) if is_device else (0, 0),
        )  # fmt: skip
        tree.add(path, node)
        if node.is_directory:
            visit(file, path)

    visit(os.fsencode(root), ())
    return tree


TYPES = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.CONTTYPE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


def load_tar(path: Path) -> Tree:
    """A tar file, plain or compressed (gzip, bzip2, xz), with its owners. A later entry replaces an earlier one."""
    tree = Tree()
    plain = _plain(path)
    try:
        with tarfile.open(fileobj=plain, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            for member in archive:
                _add_member(tree, plain, member)
                archive.members = []  # type: ignore[attr-defined]  # else all of them are kept
    except tarfile.TarError as error:
        raise SourceError(f"{path}: not a tar file that can be read: {error}") from error
    except (ValueError, OverflowError, UnicodeError) as error:
        raise SourceError(f"{path}: a broken tar header: {error}") from error
    return tree


def _plain(path: Path) -> IO[bytes]:
    """The file itself, or an unlinked temporary file of what it holds compressed."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    opener = _decompressor(file.read(6))
    file.seek(0)
    if opener is None:
        return file
    plain: IO[bytes] = tempfile.TemporaryFile(prefix="enclavekit-")  # noqa: SIM115 - it lives as long as the tree
    try:
        with file, opener(file) as packed:
            written = 0
            while data := packed.read(CHUNK):
                written += len(data)
                if written > MAX_UNCOMPRESSED:
                    raise SourceError(f"{path}: more than {MAX_UNCOMPRESSED} bytes after decompression")
                plain.write(data)
        plain.flush()
    except SourceError:
        plain.close()
        raise
    except (OSError, EOFError, ValueError) as error:
        plain.close()
        if isinstance(error, OSError) and error.errno is not None:
            raise FileError.of(error, tempfile.gettempdir(), "write to") from error
        raise SourceError(f"{path}: cannot decompress it: {error}") from error
    except Exception as error:  # lzma and zlib have error classes of their own
        plain.close()
        raise SourceError(f"{path}: cannot decompress it: {error}") from error
    return plain


def _decompressor(head: bytes):  # type: ignore[no-untyped-def]  # noqa: ANN202 - three unrelated file classes
    import bz2
    import gzip
    import lzma

    for magic, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open)):
        if head.startswith(magic):
            return opener
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        raise SourceError("tar: compressed with zstd, expected gzip, bzip2, xz or none", hint="unpack it with zstd -d")
    return None


def _add_member(tree: Tree, file: IO[bytes], member: tarfile.TarInfo) -> None:
    path = _tree_path(member.name)
    if member.type == tarfile.LNKTYPE:
        tree.link(path, _tree_path(member.linkname))
        return
    kind = TYPES.get(member.type)
    if kind is None:
        what = "a sparse file" if member.issparse() else f"an entry of type {member.type!r}"
        raise SourceError(f"{show(path)}: {what}, which cannot be used", hint="make the tar without --sparse")
    mtime = min(max(int(member.mtime), 0), MAX_TIME)
    tree.newest = max(tree.newest, mtime)
    content: BytesContent | Slice = BytesContent(b"")
    if kind == stat.S_IFLNK:
        content = BytesContent(member.linkname.encode("utf-8", "surrogateescape"))
    elif kind == stat.S_IFREG:
        content = Slice(file, member.offset_data, member.size, str(file.name))
    is_device = kind in (stat.S_IFCHR, stat.S_IFBLK)
    tree.add(
        path,
        Node(
            mode=kind | (0o777 if kind == stat.S_IFLNK else stat.S_IMODE(member.mode)),
            uid=member.uid,
            gid=member.gid,
            mtime=mtime,
            content=content,
            device=(member.devmajor, member.devminor) if is_device else (0, 0),
        ),
    )


def _tree_path(name: str) -> TreePath:
    """Absolute names and ``./`` are taken as from the root; ``..`` is refused by the tree."""
    return tuple(part for part in name.encode("utf-8", "surrogateescape").split(b"/") if part not in (b"", b"."))
