# SPDX-License-Identifier: Apache-2.0
"""CRCs of parts put together, so that an image's CRC needs no second look at bytes whose CRC is known.

Source: zlib, crc32_combine. A CRC is a remainder modulo a polynomial over GF(2): appending n bits to what came before
multiplies it by x^n. Bits are reflected: the highest bit of a word is x^0.
"""

from __future__ import annotations

from collections.abc import Iterable

POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


def combine(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of parts one after another, from each one's CRC and its size in bytes."""
    combined = 0
    for crc, size in parts:
        combined = _multiply(_power_of_x(8 * size), combined) ^ crc
    return combined


def _power_of_x(exponent: int) -> int:
    result, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        exponent >>= 1
    return result


def _multiply(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product
