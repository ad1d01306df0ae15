# SPDX-License-Identifier: Apache-2.0
"""Compares bytes of two files: where they are the same, without hashing, reading each byte once."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from typing import BinaryIO

from enclavekit.eif import Content, FileContent
from enclavekit.errors import FileError

BLOCK_SIZE = 1 << 18


def different_blocks(one: FileContent, other: FileContent) -> list[int]:
    """The indexes of blocks of 256 KiB that are not the same; both contents have one size."""
    # bytearrays compare by memcmp, and are read into without a copy.
    ours, theirs = bytearray(BLOCK_SIZE), bytearray(BLOCK_SIZE)
    blocks = []
    for index, offset in enumerate(range(0, one.size, BLOCK_SIZE)):
        size = min(BLOCK_SIZE, one.size - offset)
        if size < BLOCK_SIZE:
            ours, theirs = bytearray(size), bytearray(size)
        _fill(one, offset, ours)
        _fill(other, offset, theirs)
        if ours != theirs:
            blocks.append(index)
    return blocks


def same(one: FileContent, other: FileContent) -> bool:
    """Whether the bytes are the same; stops at the first that is not."""
    if one.size != other.size:
        return False
    ours, theirs = bytearray(), bytearray()
    for offset in range(0, one.size, BLOCK_SIZE):
        size = min(BLOCK_SIZE, one.size - offset)
        if len(ours) != size:
            ours, theirs = bytearray(size), bytearray(size)
        _fill(one, offset, ours)
        _fill(other, offset, theirs)
        if ours != theirs:
            return False
    return True


def touches(blocks: list[int], start: int, end: int) -> bool:
    """Whether any of these blocks (sorted) has bytes of this range."""
    if start >= end:
        return False
    place = bisect_right(blocks, (end - 1) // BLOCK_SIZE)
    return place > 0 and blocks[place - 1] >= start // BLOCK_SIZE


def same_joined(ones: list[Content], others: list[Content]) -> bool:
    """Whether contents one after another are the same, wherever one ends and the next begins."""
    ours, theirs = _joined(ones), _joined(others)
    one = other = b""
    while True:
        one = one or next(ours, b"")
        other = other or next(theirs, b"")
        if not one or not other:
            return not one and not other
        size = min(len(one), len(other))
        if one[:size] != other[:size]:
            return False
        one, other = one[size:], other[size:]


def _joined(contents: list[Content]) -> Iterator[bytes]:
    for content in contents:
        yield from filter(None, content.chunks())


def _fill(content: FileContent, offset: int, buffer: bytearray) -> None:
    descriptor, position = content.file.fileno(), content.offset + offset
    view = memoryview(buffer)
    while view:
        try:
            have = os.preadv(descriptor, [view], position)
        except OSError as error:
            raise FileError.of(error, content.name, "read") from error
        if not have:
            raise FileError(f"cannot read {content.name}: it ends at offset 0x{position:x}, and had more before")
        view, position = view[have:], position + have


def whole(file: BinaryIO, name: str) -> FileContent:
    """All of a file."""
    return FileContent(file, 0, os.fstat(file.fileno()).st_size, name)
