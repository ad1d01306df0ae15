# SPDX-License-Identifier: Apache-2.0
"""Where the parent's memory is: the files that hold it, by guest physical addresses.

Firmware has the maps torn down and made again, so whoever was given a place looks it up once and keeps it: files stay
open until ``close``, whatever becomes of their maps. There is one descriptor for a file, however many maps it has.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from dataclasses import dataclass

from enclavekit.errors import ProtocolError
from enclavekit.lab.vfio_user_message import DMA_READ, DMA_WRITE, MAX_DMA_MAPS

PAGE_SIZE = 4096
ADDRESS_END = 1 << 64
MAX_FILES = 16
"""The parent's RAM is one file; a few more do no harm."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of guest memory that is in one place of one file."""

    address: int
    size: int
    fd: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Map:
    """``fd`` is None where the client has no file for it: ROM, registers of other devices."""

    address: int
    size: int
    fd: int | None
    offset: int
    writable: bool


class DmaMaps:
    """Maps that do not overlap, ordered by address. Raises ``ProtocolError`` for what a client must not say."""

    def __init__(self) -> None:
        self._maps: list[_Map] = []
        self._files: dict[tuple[int, int], int] = {}

    def add(self, address: int, size: int, flags: int, fd: int | None, offset: int) -> None:
        """Map a range. ``fd`` stays the caller's; a duplicate is kept."""
        where = f"vfio-user: DMA map at {address:#018x}"
        if not size or (address | size | offset) % PAGE_SIZE:
            raise ProtocolError(f"{where}: size {size:#x} and offset {offset:#x} are not of whole pages")
        if address + size > ADDRESS_END or flags & ~(DMA_READ | DMA_WRITE):
            raise ProtocolError(f"{where}: size {size:#x} and flags {flags:#x} are not within bounds")
        if len(self._maps) >= MAX_DMA_MAPS:
            raise ProtocolError(f"{where}: {MAX_DMA_MAPS} are there already, which is the limit")
        index = self._index(address)
        for beside in self._maps[max(index - 1, 0) : index + 1]:
            if beside.address < address + size and address < beside.address + beside.size:
                raise ProtocolError(f"{where}: size {size:#x} overlaps the one at {beside.address:#018x}")
        kept = None if fd is None else self._keep(fd, offset + size, where)
        usable = flags == DMA_READ | DMA_WRITE
        self._maps.insert(index, _Map(address, size, kept, offset, usable))

    def remove(self, address: int, size: int) -> None:
        """Unmap one: a map is torn down as it was made."""
        index = self._index(address) - 1
        if index < 0 or (self._maps[index].address, self._maps[index].size) != (address, size):
            raise ProtocolError(f"vfio-user: DMA unmap at {address:#018x}: no map of size {size:#x} is there")
        del self._maps[index]

    def clear(self) -> None:
        """Unmap all."""
        self._maps.clear()

    def find(self, address: int, size: int) -> list[Piece]:
        """Where a range is, in order; nothing unless all of it is writable memory in files."""
        found: list[Piece] = []
        at, end = address, address + size
        for one in self._maps[max(self._index(address) - 1, 0) :]:
            if at >= end:
                break
            if one.fd is None or not one.writable or not one.address <= at < one.address + one.size:
                return []
            length = min(end, one.address + one.size) - at
            piece = Piece(at, length, one.fd, one.offset + at - one.address)
            last = found[-1] if found else None
            if last and last.fd == piece.fd and last.offset + last.size == piece.offset:
                found[-1] = Piece(last.address, last.size + length, last.fd, last.offset)
            else:
                found.append(piece)
            at += length
        return found if at >= end else []

    def close(self) -> None:
        """Forget all maps and close all files. Twice does no harm."""
        self._maps.clear()
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def _index(self, address: int) -> int:
        """Of the first map beyond the address."""
        return bisect_right(self._maps, address, key=lambda one: one.address)

    def _keep(self, fd: int, end: int, where: str) -> int:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or end > status.st_size:
            raise ProtocolError(f"{where}: what comes along is no file of {end:#x} bytes and more")
        name = (status.st_dev, status.st_ino)
        if name not in self._files:
            if len(self._files) >= MAX_FILES:
                raise ProtocolError(f"{where}: a file more than the {MAX_FILES} that there may be")
            try:
                self._files[name] = os.dup(fd)
            except OSError as error:
                raise ProtocolError(
                    f"{where}: cannot keep its file open: {(error.strerror or str(error)).lower()}"
                ) from error
        return self._files[name]
