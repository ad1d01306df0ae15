# SPDX-License-Identifier: Apache-2.0
"""tar archives from hostile hands: their members as nodes, whose data stay in the archive; compressed ones unpacked.

tarfile reads the headers (ustar, GNU and pax); what it makes of bad ones is checked here.
"""

from __future__ import annotations

import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from enclavekit.eif import BytesContent, FileContent
from enclavekit.errors import FileError, FormatError, SourceError
from enclavekit.image.decompress import LONGEST_MAGIC, compression_of, decompressed
from enclavekit.image.tree import MAX_TIME, Node, normalise, shown

MAX_UNPACKED_SIZE = 64 << 30
MIN_UNPACKED_SIZE = 1 << 30
MAX_RATIO = 100
"""A compressed tar may become 1 GiB, or a hundred times its size, and never more than 64 GiB."""
COMPRESSIONS = ("gzip", "bzip2", "xz", "zstd")
"""Of tars. The magic of lzma is a file's name."""

_BLOCK = 512
_XATTR = "SCHILY.xattr."
# What tarfile raises for bad bytes, besides its own errors: it was not written for hostile ones.
_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, LookupError, MemoryError)
_KINDS = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.CONTTYPE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


_DESCRIBING = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
MAX_DESCRIPTION_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """One entry. ``node`` is None for a hard link, which ``target`` is the path of. ``xattrs`` are names."""

    path: bytes
    node: Node | None
    target: bytes = b""
    xattrs: tuple[str, ...] = ()


class Header(tarfile.TarInfo):
    """tarfile's, but what describes a member (a long name, PAX records) is held in memory, and so has bounds."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _DESCRIBING and self.size > MAX_DESCRIPTION_SIZE:
            raise SourceError(
                f"tar: {self.size} bytes that describe one member, expected at most {MAX_DESCRIPTION_SIZE}"
            )
        return super()._proc_member(tar)  # type: ignore[misc, no-any-return]  # not in typeshed


def plain(file: BinaryIO, where: str, scratch: Path | None) -> BinaryIO:
    """The file itself, or an unnamed one in ``scratch`` with what it holds when it is compressed."""
    file.seek(0)
    compression = compression_of(file.read(LONGEST_MAGIC))
    file.seek(0)
    if compression not in COMPRESSIONS:
        return file
    try:
        out = cast(BinaryIO, tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115  # kept open by the caller
    except OSError as error:
        raise FileError.of(error, scratch or tempfile.gettempdir(), "make a temporary file in") from error
    try:
        size = os.fstat(file.fileno()).st_size
        chunks = FileContent(file, 0, size, where).chunks()
        for piece in decompressed(chunks, where, compressions=COMPRESSIONS, limit=unpacked_limit(size)):
            out.write(piece)
        out.flush()
    except FormatError as error:
        out.close()
        raise SourceError(error.message) from error
    except OSError as error:
        out.close()
        raise FileError.of(error, where, "unpack") from error
    except BaseException:
        out.close()
        raise
    return out


def unpacked_limit(size: int) -> int:
    """What a compressed tar of this size may become."""
    return min(max(MIN_UNPACKED_SIZE, MAX_RATIO * size), MAX_UNPACKED_SIZE)


def read_tar(file: BinaryIO, where: str) -> Iterator[Member]:
    """The members of an uncompressed tar, in its order; SourceError for a broken one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape", tarinfo=Header) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if tar.offset < member.offset_data:
                    raise SourceError(f"{where}: member at offset 0x{member.offset:x} has a negative size")
                yield _member(member, file, where, size)
            end = tar.offset
    except _ERRORS as error:
        raise SourceError(f"{where}: not a tar, or a broken one: {str(error).lower()}") from error
    except OSError as error:
        raise FileError.of(error, where, "read") from error
    # tarfile takes a broken header for the end. The true end is a block of zeros.
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise SourceError(f"{where}: no end of the archive at offset 0x{end:x}: broken, or cut off")


def _member(member: tarfile.TarInfo, file: BinaryIO, where: str, size: int) -> Member:
    path = normalise(member.name.encode("utf-8", "surrogateescape"))
    target = member.linkname.encode("utf-8", "surrogateescape")
    if member.type == tarfile.LNKTYPE:
        return Member(path, None, normalise(target))
    kind = _KINDS.get(member.type)
    if kind is None or member.issparse():
        what = "a sparse file" if member.issparse() else f"of type {member.type!r}"
        raise SourceError(f"{where}: member {shown(path)} is {what}, which no ramdisk can hold")
    content: BytesContent | FileContent = BytesContent(b"")
    if kind == stat.S_IFREG:
        if not 0 <= member.size <= size - member.offset_data:
            raise SourceError(f"{where}: member {shown(path)} is cut off")
        content = FileContent(file, member.offset_data, member.size, f"{where} ({shown(path)})")
    elif kind == stat.S_IFLNK:
        content = BytesContent(target)
    if not path and kind != stat.S_IFDIR:
        raise SourceError(f"{where}: a member without a name")
    is_device = kind in (stat.S_IFCHR, stat.S_IFBLK)
    node = Node(
        mode=kind | stat.S_IMODE(member.mode),
        uid=member.uid,
        gid=member.gid,
        mtime=int(min(max(member.mtime, 0), MAX_TIME)),
        content=content,
        rdev=(member.devmajor, member.devminor) if is_device else (0, 0),
    )
    if not (0 <= node.uid <= 0xFFFFFFFE and 0 <= node.gid <= 0xFFFFFFFE):
        raise SourceError(f"{where}: member {shown(path)} has owner {node.uid}:{node.gid}, expected 32-bit numbers")
    xattrs = tuple(key.removeprefix(_XATTR) for key in member.pax_headers if key.startswith(_XATTR))
    return Member(path, node, xattrs=xattrs)
