# SPDX-License-Identifier: Apache-2.0
"""CBOR (RFC 8949) of attestation documents, read item by item by someone who knows which comes next.

A general decoder has to choose for things that no document has: which of two same keys counts, what a tag makes of an
item, whether True is 1. This one knows integers, byte and text strings, arrays, maps and null; arrays and maps of
either form of length, for the NSM has changed from one to the other; strings only whole. All else is refused, by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

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
        return _MAJORS[self._peek_byte() >> 5]

    def next_name(self) -> str:
        """The same in words, for messages."""
        first = self._peek_byte()
        return {NULL: "null", 0xF4: "false", 0xF5: "true"}.get(first, _NAMES[Major(first >> 5)])

    def null(self) -> bool:
        """Read a null if one comes next, and say whether."""
        if self._peek_byte() != NULL:
            return False
        self._at += 1
        return True

    def tag(self) -> int:
        """A tag's number; the tagged item comes next."""
        return self._length(Major.TAG, "tag")

    def unsigned(self, field: str) -> int:
        """0 to 2⁶⁴ - 1."""
        return self._length(Major.UNSIGNED, field)

    def integer(self, field: str) -> int:
        """-2⁶⁴ to 2⁶⁴ - 1."""
        if self.peek() is Major.NEGATIVE:
            return -1 - self._length(Major.NEGATIVE, field)
        return self.unsigned(field)

    def byte_string(self, field: str) -> bytes:
        """A byte string in one piece."""
        return self._string(Major.BYTES, field)

    def text_string(self, field: str) -> str:
        """A text string in one piece, of valid UTF-8."""
        raw = self._string(Major.TEXT, field)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CborMalformedError(f"{self._where}: {field}: not UTF-8") from error

    def array(self, field: str) -> Iterator[int]:
        """The elements' numbers: read one element at each step."""
        return self._items(Major.ARRAY, field)

    def map(self, field: str) -> Iterator[int]:
        """The entries' numbers: read one key and one value at each step. Duplicates are for the caller to see."""
        return self._items(Major.MAP, field)

    def skip(self, field: str, depth: int = 1) -> None:
        """Any item at all, within bounds."""
        if depth > MAX_DEPTH:
            raise CborDepthError(f"{self._where}: {field}: deeper than {MAX_DEPTH} arrays and maps")
        major = self.peek()
        if major in {Major.ARRAY, Major.MAP}:
            for _ in self._items(major, field):
                for _ in range(2 if major is Major.MAP else 1):
                    self.skip(field, depth + 1)
        elif major in {Major.BYTES, Major.TEXT}:
            self._string(major, field)
        else:
            self._head(field)
            if major is Major.TAG:
                self.skip(field, depth + 1)

    def _items(self, major: Major, field: str) -> Iterator[int]:
        count = self._count(major, field)
        if count is None:
            index = 0
            while self._peek_byte() != _BREAK:
                yield index
                index += 1
            self._at += 1
        else:
            yield from range(count)

    def _count(self, major: Major, field: str) -> int | None:
        """Of the entries; None when a break ends them."""
        self._expect(major, field)
        if self._data[self._at] & 0x1F == _INDEFINITE:
            self._at += 1
            return None
        count = self._head(field)
        left = len(self._data) - self._at
        if count * (2 if major is Major.MAP else 1) > left:
            raise CborTruncatedError(f"{self._where}: {field}: {count} entries in the {left} bytes that are left")
        return count

    def _string(self, major: Major, field: str) -> bytes:
        size = self._length(major, field)
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise CborTruncatedError(f"{self._where}: {field}: {size} bytes, {len(self._data) - start} are left")
        return self._data[start : self._at]

    def _length(self, major: Major, field: str) -> int:
        self._expect(major, field)
        info = self._data[self._at] & 0x1F
        if info < 24:  # most are: this is only to be quick
            self._at += 1
            return info
        return self._head(field)

    def _expect(self, major: Major, field: str) -> None:
        if self._at >= len(self._data) or self._data[self._at] >> 5 != major:
            raise FieldTypeError(f"{self._where}: {field}: {self.next_name()}, expected {_NAMES[major]}")

    def _head(self, field: str) -> int:
        """The number that an item's head holds."""
        info = self._peek_byte() & 0x1F
        self._at += 1
        if info < 24:
            return info
        if info > 27:
            what = "chunks of indefinite length" if info == _INDEFINITE else f"additional information {info}"
            raise CborMalformedError(f"{self._where}: {field}: {what}, expected a definite length")
        size = 1 << (info - 24)
        raw = self._data[self._at : self._at + size]
        if len(raw) != size:
            raise CborTruncatedError(f"{self._where}: {field}: ends within the item's head")
        self._at += size
        return int.from_bytes(raw, "big")

    def _peek_byte(self) -> int:
        if self._at >= len(self._data):
            raise CborTruncatedError(f"{self._where}: ends at byte {self._at}, where another item must follow")
        return self._data[self._at]
