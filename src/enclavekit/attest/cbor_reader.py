# SPDX-License-Identifier: Apache-2.0
"""CBOR (RFC 8949) of attestation documents, read item by item by someone who knows which comes next.

A general decoder has to choose for things that no document has: which of two same keys counts, what a tag makes of an
item, whether True is 1. This one knows integers, byte and text strings, arrays, maps and null; arrays and maps of
either form of length, for the NSM has changed from one to the other; strings only whole. All else is refused, by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from itertools import count

from enclavekit.errors import (
    CborDepthError,
    CborMalformedError,
    CborTruncatedError,
    FieldTypeError,
    TrailingBytesError,
)

MAX_DEPTH = 16
NULL = 0xF6
_BREAK = 0xFF
_INDEFINITE = 31


class Major(IntEnum):
    """The upper three bits of an item's first byte (RFC 8949 §3.1)."""

    UNSIGNED = 0
    NEGATIVE = 1
    BYTES = 2
    TEXT = 3
    ARRAY = 4
    MAP = 5
    TAG = 6
    SIMPLE = 7


_MAJORS = tuple(Major)
_NAMES = {
    Major.UNSIGNED: "an integer",
    Major.NEGATIVE: "a negative integer",
    Major.BYTES: "a byte string",
    Major.TEXT: "a text string",
    Major.ARRAY: "an array",
    Major.MAP: "a map",
    Major.TAG: "a tag",
    Major.SIMPLE: "a simple value or float",
}


class CborReader:
    """A cursor over ``data``; ``where`` names it in messages. Whatever it reads lies within ``data``."""

    def __init__(self, data: bytes, where: str) -> None:
        self._data = data
        self._where = where
        self._at = 0

    def check_form(self) -> None:
        """One whole item, well-formed as far as strings are not looked into, and nothing after it; nothing is read."""
        self.skip(self._where)
        self.end()
        self._at = 0

    def end(self) -> None:
        """All of the data must have been read."""
        rest = len(self._data) - self._at
        if rest:
            raise TrailingBytesError(f"{self._where}: {rest} bytes after the CBOR item, expected none")

    def peek(self) -> Major:
        """What kind of item comes next."""
        if self._at >= len(self._data):
            raise self._ended()
        return _MAJORS[self._data[self._at] >> 5]

    def next_name(self) -> str:
        """The same in words, for messages."""
        major = self.peek()
        return {NULL: "null", 0xF4: "false", 0xF5: "true"}.get(self._data[self._at], _NAMES[major])

    def null(self) -> bool:
        """Read a null if one comes next, and say whether."""
        if self.peek() is not Major.SIMPLE or self._data[self._at] != NULL:
            return False
        self._at += 1
        return True

    def tag(self) -> int:
        """A tag's number; the tagged item comes next."""
        return self._number(Major.TAG, "tag")

    def unsigned(self, field: str) -> int:
        """0 to 2⁶⁴ - 1."""
        return self._number(Major.UNSIGNED, field)

    def integer(self, field: str) -> int:
        """-2⁶⁴ to 2⁶⁴ - 1."""
        if self.peek() is Major.NEGATIVE:
            return -1 - self._number(Major.NEGATIVE, field)
        return self._number(Major.UNSIGNED, field)

    def byte_string(self, field: str, major: Major = Major.BYTES) -> bytes:
        """A byte string in one piece."""
        size = self._number(major, field)
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise CborTruncatedError(f"{self._where}: {field}: {size} bytes, {len(self._data) - start} are left")
        return self._data[start : self._at]

    def text_string(self, field: str) -> str:
        """A text string in one piece, of valid UTF-8."""
        raw = self.byte_string(field, Major.TEXT)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CborMalformedError(f"{self._where}: {field}: not UTF-8") from error

    def array(self, field: str) -> Iterable[int]:
        """The elements' numbers: read one element at each step."""
        return self._items(Major.ARRAY, field)

    def map(self, field: str) -> Iterable[int]:
        """The entries' numbers: read one key and one value at each step. Duplicates are for the caller to see."""
        return self._items(Major.MAP, field)

    def skip(self, field: str, depth: int = 1) -> None:
        """Any item at all, within bounds."""
        if depth > MAX_DEPTH:
            raise CborDepthError(f"{self._where}: {field}: deeper than {MAX_DEPTH} arrays and maps")
        major = self.peek()
        if major is Major.BYTES or major is Major.TEXT:
            self.byte_string(field, major)
        elif major is Major.ARRAY or major is Major.MAP:
            for _ in self._items(major, field):
                for _ in range(2 if major is Major.MAP else 1):
                    self.skip(field, depth + 1)
        else:
            self._number(major, field)
            if major is Major.TAG:
                self.skip(field, depth + 1)

    def _items(self, major: Major, field: str) -> Iterable[int]:
        if self.peek() is major and self._data[self._at] & 0x1F == _INDEFINITE:
            self._at += 1
            return self._until_break()
        entries = self._number(major, field)
        left = len(self._data) - self._at
        if entries * (2 if major is Major.MAP else 1) > left:
            raise CborTruncatedError(f"{self._where}: {field}: {entries} entries in the {left} bytes that are left")
        return range(entries)

    def _until_break(self) -> Iterator[int]:
        for index in count():
            self.peek()
            if self._data[self._at] == _BREAK:
                self._at += 1
                return
            yield index

    def _number(self, major: Major, field: str) -> int:
        """That an item's head holds; the item must be of that kind. All that is read goes through here."""
        at, data = self._at, self._data
        if at >= len(data) or data[at] >> 5 != major:
            raise FieldTypeError(f"{self._where}: {field}: {self.next_name()}, expected {_NAMES[major]}")
        info = data[at] & 0x1F
        at += 1
        if info >= 24:
            if info > 27:
                what = "chunks of indefinite length" if info == _INDEFINITE else f"additional information {info}"
                raise CborMalformedError(f"{self._where}: {field}: {what}, expected a definite length")
            size = 1 << (info - 24)
            raw = data[at : at + size]
            if len(raw) != size:
                raise CborTruncatedError(f"{self._where}: {field}: ends within the item's head")
            info = int.from_bytes(raw, "big")
            at += size
        self._at = at
        return info

    def _ended(self) -> CborTruncatedError:
        return CborTruncatedError(f"{self._where}: ends at byte {self._at}, where another item must follow")
