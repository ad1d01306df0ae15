# SPDX-License-Identifier: Apache-2.0
"""cpio archives in the "newc" format, which Linux unpacks as its initial root file system.

Source: linux Documentation/driver-api/early-userspace/buffer-format.rst and init/initramfs.c.
An entry is a 110-byte header of ASCII digits, the name with a NUL, padding to 4, the data, padding to 4. An entry named
``TRAILER!!!`` ends the archive, and NULs then fill it up to a multiple of 512, so that archives can follow one another.
"""

from __future__ import annotations

import re
from binascii import unhexlify
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from struct import Struct
from typing import BinaryIO, ClassVar, Self

from enclavekit.errors import FormatError, TruncatedError

MAGIC = b"070701"
TRAILER = b"TRAILER!!!"
HEADER_SIZE = 110
BLOCK_SIZE = 512
MAX_NAME_SIZE = 4096
"""PATH_MAX: with its NUL; the kernel skips entries with longer names."""
MAX_FIELD = 0xFFFFFFFF

_HEX = re.compile(rb"[0-9a-fA-F]+")


@dataclass(frozen=True, slots=True)
class Entry:
    """One header. Entries with the same ``ino`` and an ``nlink`` above 1 are one file; its data stand with the last."""

    name: bytes
    mode: int
    size: int = 0
    ino: int = 0
    uid: int = 0
    gid: int = 0
    nlink: int = 1
    mtime: int = 0
    dev: tuple[int, int] = (0, 0)
    rdev: tuple[int, int] = (0, 0)

    # As thirteen 32-bit numbers; in the file each one is eight hexadecimal digits.
    LAYOUT: ClassVar[Struct] = Struct(
        ">"  #      big-endian
        "I"  # 0x06 ino
        "I"  # 0x0e mode, with the file type
        "I"  # 0x16 uid
        "I"  # 0x1e gid
        "I"  # 0x26 nlink
        "I"  # 0x2e mtime, seconds since 1970
        "I"  # 0x36 filesize, bytes of data
        "I"  # 0x3e devmajor, of the file system that the file lay on
        "I"  # 0x46 devminor
        "I"  # 0x4e rdevmajor, of the device that the file is
        "I"  # 0x56 rdevminor
        "I"  # 0x5e namesize, with the NUL
        "I"  # 0x66 check, 0 in this format
    )

    def __bytes__(self) -> bytes:
        """Header, name and padding; what the fields cannot hold is a FormatError."""
        name = self.name.decode("utf-8", "backslashreplace")
        if not self.name or b"\0" in self.name or len(self.name) >= MAX_NAME_SIZE:
            raise FormatError(
                f"cpio entry {name[:64]!r}: name of {len(self.name)} bytes, expected 1 to 4095 without NUL"
            )
        if self.size > MAX_FIELD:
            raise FormatError(
                f"cpio entry {name}: {self.size} bytes, at most 4294967295 fit in this format",
                hint="split the file, or bring it into the enclave over vsock",
            )
        fields = (
            *(self.ino, self.mode, self.uid, self.gid, self.nlink, self.mtime, self.size),
            *(*self.dev, *self.rdev, len(self.name) + 1, 0),
        )
        if min(fields) < 0 or max(fields) > MAX_FIELD:
            raise FormatError(f"cpio entry {name}: a number in {fields} does not fit in 32 bits")
        head = MAGIC + self.LAYOUT.pack(*fields).hex().encode() + self.name + b"\0"
        return head + bytes(-len(head) % 4)

    @classmethod
    def parse(cls, header: bytes, name: bytes, offset: int) -> Self:
        """From the 110 header bytes and the name without its NUL; ``offset`` is for the message."""
        fields = _fields(header, offset)
        ino, mode, uid, gid, nlink, mtime, size, dev_major, dev_minor, rdev_major, rdev_minor, _, _ = fields
        return cls(
            name, mode, size, ino, uid, gid, nlink, mtime, dev=(dev_major, dev_minor), rdev=(rdev_major, rdev_minor)
        )


@dataclass(frozen=True, slots=True)
class Member:
    """An entry that was read, and where it and its data start in the source."""

    entry: Entry
    offset: int
    data_offset: int


def archive_size(entries: Iterable[Entry]) -> int:
    """Bytes of the whole archive, known before any data are read."""
    size = sum(len(bytes(entry)) + _padded(entry.size) for entry in entries)
    size += len(bytes(Entry(TRAILER, 0)))
    return size + -size % BLOCK_SIZE


def archive(items: Iterable[tuple[Entry, Iterable[bytes]]]) -> Iterator[bytes]:
    """The archive's bytes in pieces. Data that are not as long as their entry says are a ValueError."""
    written = 0
    for entry, data in items:
        head = bytes(entry)
        yield head
        size = 0
        for chunk in data:
            size += len(chunk)
            if size > entry.size:
                break
            yield chunk
        if size != entry.size:
            raise ValueError(f"data of {entry.name!r} are not {entry.size} bytes long")
        if size % 4:
            yield bytes(-size % 4)
        written += len(head) + _padded(size)
    trailer = bytes(Entry(TRAILER, 0))
    yield trailer
    written += len(trailer)
    yield bytes(-written % BLOCK_SIZE)


def read(source: BinaryIO, offset: int = 0, end: int | None = None) -> Generator[Member, None, int]:
    """The members of the archive that starts at ``offset`` of a seekable file, up to its trailer.

    ``end`` is where the source ends, by default the file's end. Data are left where they are. The generator's value is
    where the trailer ends. Whatever the bytes, this yields, ends, or raises FormatError or TruncatedError.
    """
    if end is None:
        end = source.seek(0, 2)
    start = offset
    while True:
        header = _read(source, offset, HEADER_SIZE, end, "header")
        name_size = _fields(header, offset)[-2]
        if not 1 < name_size <= MAX_NAME_SIZE:
            raise FormatError(f"cpio entry at offset 0x{offset:x}: name of {name_size} bytes, expected 2 to 4096")
        name = _read(source, offset + HEADER_SIZE, name_size, end, "name")
        if name.find(b"\0") != name_size - 1:
            raise FormatError(f"cpio entry at offset 0x{offset:x}: name does not end at its NUL")
        entry = Entry.parse(header, name[:-1], offset)
        data = start + _padded(offset + HEADER_SIZE + name_size - start)
        if entry.name == TRAILER:
            return min(data, end)
        if entry.size > end - data:
            raise TruncatedError(
                f"cpio data at offset 0x{data:x}: need {entry.size} bytes, have {max(0, end - data)}",
            )
        yield Member(entry, offset, data)
        offset = data + _padded(entry.size)


def _padded(size: int) -> int:
    return size + -size % 4


def _fields(header: bytes, offset: int) -> tuple[int, ...]:
    if header[:6] != MAGIC:
        raise FormatError(f"cpio entry at offset 0x{offset:x}: magic {header[:6]!r}, expected {MAGIC!r}")
    if not _HEX.fullmatch(header, 6):
        raise FormatError(f"cpio entry at offset 0x{offset:x}: header is not all hexadecimal digits")
    return Entry.LAYOUT.unpack(unhexlify(header[6:]))


def _read(source: BinaryIO, offset: int, size: int, end: int, what: str) -> bytes:
    source.seek(min(offset, end))
    data = source.read(min(size, max(0, end - offset)))
    if len(data) < size:
        raise TruncatedError(f"cpio {what} at offset 0x{offset:x}: need {size} bytes, have {len(data)}")
    return data
