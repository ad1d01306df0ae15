# SPDX-License-Identifier: Apache-2.0
"""BER (X.690 §8), as far as CMS from AWS KMS needs it: one-byte tags, definite and indefinite lengths.

Every failure is a ValueError; who calls has one error of its own for all.
"""

from __future__ import annotations

from dataclasses import dataclass

OCTET_STRING = 0x04
OBJECT_IDENTIFIER = 0x06
SEQUENCE = 0x10
SET = 0x11
CONTEXT_0 = 0x80
CONSTRUCTED = 0x20

MAX_DEPTH = 16
_MULTI_BYTE_TAG = 0x1F
_INDEFINITE = 0x80
_END_OF_CONTENTS = b"\0\0"


@dataclass(frozen=True, slots=True)
class Element:
    """``tag`` has class and number; ``content`` is a primitive's, ``children`` are a constructed one's."""

    tag: int
    content: bytes | None
    children: tuple[Element, ...] = ()

    def sequence(self, count: int | None = None) -> tuple[Element, ...]:
        """A SEQUENCE's elements, of that number."""
        return self.constructed(SEQUENCE, count)

    def constructed(self, tag: int, count: int | None = None) -> tuple[Element, ...]:
        """The elements of one with that tag."""
        if self.tag != tag or self.content is not None or count not in {None, len(self.children)}:
            raise ValueError("another element than expected")
        return self.children

    def octets(self, tag: int) -> bytes:
        """A primitive's content."""
        if self.tag != tag or self.content is None:
            raise ValueError("another element than expected")
        return self.content

    def joined(self, tag: int) -> bytes:
        """A string's content, also when it comes in several OCTET STRINGs."""
        if self.tag != tag:
            raise ValueError("another element than expected")
        if self.content is not None:
            return self.content
        return b"".join(child.joined(OCTET_STRING) for child in self.children)


def parse(data: bytes) -> Element:
    """One element that takes all of ``data``."""
    element, end = _parse(data, 0, 1)
    if end != len(data):
        raise ValueError("bytes after the element")
    return element


def _parse(data: bytes, at: int, depth: int) -> tuple[Element, int]:
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    identifier, first = _bytes(data, at, 2)
    at += 2
    if identifier & _MULTI_BYTE_TAG == _MULTI_BYTE_TAG:
        raise ValueError("a tag of several bytes")
    tag, constructed = identifier & ~CONSTRUCTED, bool(identifier & CONSTRUCTED)
    if first == _INDEFINITE:
        if not constructed:
            raise ValueError("a primitive of indefinite length")
        children = []
        while _bytes(data, at, 2) != _END_OF_CONTENTS:
            child, at = _parse(data, at, depth + 1)
            children.append(child)
        return Element(tag, None, tuple(children)), at + 2
    size = first
    if first > _INDEFINITE:
        width = first & 0x7F
        size = int.from_bytes(_bytes(data, at, width), "big")
        at += width
    content = _bytes(data, at, size)
    if not constructed:
        return Element(tag, content), at + size
    children, inside = [], 0
    while inside < size:
        child, inside = _parse(content, inside, depth + 1)
        children.append(child)
    return Element(tag, None, tuple(children)), at + size


def _bytes(data: bytes, at: int, size: int) -> bytes:
    if at + size > len(data):
        raise ValueError("ends too early")
    return data[at : at + size]
