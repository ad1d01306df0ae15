# SPDX-License-Identifier: Apache-2.0
"""CBOR (RFC 8949) from hostile hands: cbor2 decodes it, and all is refused that no format of ours needs."""

from __future__ import annotations

from io import BytesIO
from typing import NoReturn

import cbor2

from enclavekit.errors import FormatError

MAX_DEPTH = 16


def decode(data: bytes, where: str, *, max_depth: int = MAX_DEPTH) -> object:
    """One item that takes all of ``data``, made of int, bytes, str, float, bool, None, list and dict.

    Tags and duplicate keys are refused. ``where`` is for messages.
    """
    source = BytesIO(data)
    decoder = cbor2.CBORDecoder(
        source,
        tag_hook=_refuse_tag,
        semantic_decoders=dict.fromkeys(_DECODED_TAGS, _refuse_tag),
        read_size=1,  # no further than the item
        max_depth=max_depth,
        allow_duplicate_keys=False,
    )
    try:
        value: object = decoder.decode()
    except (cbor2.CBORError, ValueError, TypeError, OverflowError) as error:
        reason = error.__cause__ or error
        raise FormatError(f"{where}: not the CBOR expected: {' '.join(str(reason).lower().split())[:120]}") from error
    if source.tell() != len(data):
        raise FormatError(f"{where}: {len(data) - source.tell()} bytes after the CBOR item, expected none")
    return value


def encode(value: object) -> bytes:
    """Definite lengths and the shortest heads, keys in their order in the dict."""
    data: bytes = cbor2.dumps(value)
    return data


_DECODED_TAGS = (*(0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000, 55799),)
"""The tags that cbor2 would make objects of: dates, shared references, regular expressions..."""


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("a tag")
