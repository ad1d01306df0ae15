# SPDX-License-Identifier: Apache-2.0
"""Frames between the host and the agent in a lab's parent. No I/O, and few imports: the agent starts with the machine.

A connection is one command. The host's first frame is RUN; then both send until STATUS or FAILED ends it, or the
connection's end does, which kills the command. Neither side trusts the other: what comes is a frame or a
``ProtocolError``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import IntEnum
from struct import Struct

from enclavekit.errors import ProtocolError

MAX_PAYLOAD = 1 << 16

HEADER = Struct(
    ">"  #  big-endian, no padding
    "B"  # 0x0 kind
    "I"  # 0x1 payload length, bytes
)
SIZE = Struct(
    ">"
    "H"  # 0x0 rows
    "H"  # 0x2 columns
)
STATUS = Struct(
    ">B"  # 0x0 exit status, or 128 and the signal's number
)


class Kind(IntEnum):
    """Below 0x80 from the agent, from there on from the host."""

    STATUS = 0x01
    STDOUT = 0x02
    STDERR = 0x03
    FAILED = 0x04
    """The command could not be run; why, in UTF-8."""
    RUN = 0x81
    """A JSON object: ``words``, ``environment``, and with a terminal its ``rows`` and ``columns``."""
    INPUT = 0x82
    """Bytes of the command's standard input; none are its end."""
    RESIZE = 0x83


def encode(kind: Kind, payload: bytes = b"") -> bytes:
    """A frame's bytes."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"payload of {len(payload)} bytes, expected at most {MAX_PAYLOAD}")
    return HEADER.pack(kind, len(payload)) + payload


class Decoder:
    """Bytes in, frames out. Errors: ``ProtocolError``, after which the connection is of no more use."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """The frames that ``data`` completes."""
        self._pending += data
        while len(self._pending) >= HEADER.size:
            number, length = HEADER.unpack_from(self._pending)
            if length > MAX_PAYLOAD:
                raise ProtocolError(f"agent frame 0x{number:02x}: {length} bytes, expected at most {MAX_PAYLOAD}")
            if number not in list(Kind):
                raise ProtocolError(f"agent frame 0x{number:02x}: no such kind")
            if len(self._pending) < HEADER.size + length:
                return
            payload = bytes(self._pending[HEADER.size : HEADER.size + length])
            del self._pending[: HEADER.size + length]
            yield Kind(number), payload


def encode_size(rows: int, columns: int) -> bytes:
    """A RESIZE frame."""
    return encode(Kind.RESIZE, SIZE.pack(rows & 0xFFFF, columns & 0xFFFF))


def decode_size(payload: bytes) -> tuple[int, int]:
    """Rows and columns."""
    if len(payload) != SIZE.size:
        raise ProtocolError(f"resize frame: {len(payload)} bytes, expected {SIZE.size}")
    rows, columns = SIZE.unpack(payload)
    return rows, columns


def decode_status(payload: bytes) -> int:
    """As a shell would have it."""
    if len(payload) != STATUS.size:
        raise ProtocolError(f"status frame: {len(payload)} bytes, expected {STATUS.size}")
    return payload[0]


class Command:
    """What RUN asks for."""

    __slots__ = ("environment", "size", "words")

    def __init__(
        self, words: list[str], environment: dict[str, str] | None = None, size: tuple[int, int] | None = None
    ) -> None:
        self.words, self.environment = words, environment or {}
        self.size = size
        """Of its terminal, rows and columns; without, it has none."""

    def encode(self) -> bytes:
        """The frame. ValueError for more than fits into one."""
        said = {"words": self.words, "environment": self.environment, "size": self.size}
        return encode(Kind.RUN, json.dumps(said).encode())

    @classmethod
    def decode(cls, payload: bytes) -> Command:
        """Errors: ProtocolError."""
        try:
            said = json.loads(payload)
            words, environment, size = said["words"], said["environment"], said["size"]
            if not words or not all(isinstance(word, str) for word in [*words, *environment, *environment.values()]):
                raise ValueError("not text")
            if size is not None:
                rows, columns = (int(number) & 0xFFFF for number in size)
                size = rows, columns
            return cls(list(words), dict(environment), size)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ProtocolError("run frame: expected words, environment and size as JSON") from error
