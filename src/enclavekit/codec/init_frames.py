# SPDX-License-Identifier: Apache-2.0
"""Frames of the control connection between the host and init (docs/init.md). No I/O.

A frame is a 5-byte header, type and payload length, and the payload. Types that are not known are skipped on either
side, so images and hosts of different age understand each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

from enclavekit.errors import ProtocolError

HEADER = Struct(
    ">"  #  big-endian, no padding
    "B"  # 0x0 type
    "I"  # 0x1 payload length, bytes
)
MAX_PAYLOAD = 1 << 16
PROTOCOL_VERSION = 1
HELLO_LOGS = 1
STOP = Struct(
    ">"
    "B"  # 0x0 signal, 0 for the image's stop signal
    "I"  # 0x1 grace, milliseconds until SIGKILL
)


class FrameType(IntEnum):
    """Below 0x80 from init, from there on from the host."""

    HELLO = 0x01
    STATUS = 0x02
    STDOUT = 0x03
    STDERR = 0x04
    LOST = 0x05
    ACK = 0x81
    STOP = 0x82


class StatusKind(IntEnum):
    """How the application ended, or that it never ran."""

    EXITED = 0
    SIGNALLED = 1
    FAILED = 2


@dataclass(frozen=True, slots=True)
class Hello:
    """Init's first word on every connection."""

    version: int = PROTOCOL_VERSION
    logs: bool = False


@dataclass(frozen=True, slots=True)
class Status:
    """The end: an exit code, a signal number, or what init could not do."""

    kind: StatusKind
    value: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Stdout:
    """Some of what the application wrote."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Stderr:
    """Some of what the application wrote."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Lost:
    """Bytes of output that init had to drop because nobody took them."""

    count: int


@dataclass(frozen=True, slots=True)
class Ack:
    """The host has the status: init may go."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the application."""

    signal: int = 0
    grace_ms: int = 0


Frame = Hello | Status | Stdout | Stderr | Lost | Ack | Stop


def encode(frame: Frame) -> bytes:
    """Header and payload."""
    match frame:
        case Hello(version, logs):
            kind, payload = FrameType.HELLO, bytes([version, HELLO_LOGS if logs else 0])
        case Status(status, value, message):
            kind, payload = FrameType.STATUS, bytes([status, value]) + message.encode()
        case Stdout(data):
            kind, payload = FrameType.STDOUT, data
        case Stderr(data):
            kind, payload = FrameType.STDERR, data
        case Lost(count):
            kind, payload = FrameType.LOST, count.to_bytes(8, "big")
        case Ack():
            kind, payload = FrameType.ACK, b""
        case Stop(signal, grace_ms):
            kind, payload = FrameType.STOP, STOP.pack(signal, grace_ms)
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"payload of {len(payload)} bytes, expected at most {MAX_PAYLOAD}")
    return HEADER.pack(kind, len(payload)) + payload


class Decoder:
    """Bytes in, frames out. Errors: ``ProtocolError``, after which the connection is of no more use."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that ``data`` completes."""
        self._pending += data
        while len(self._pending) >= HEADER.size:
            kind, length = HEADER.unpack_from(self._pending)
            if length > MAX_PAYLOAD:
                raise ProtocolError(f"frame 0x{kind:02x} from init: {length} bytes, expected at most {MAX_PAYLOAD}")
            if len(self._pending) < HEADER.size + length:
                return
            payload = bytes(self._pending[HEADER.size : HEADER.size + length])
            del self._pending[: HEADER.size + length]
            frame = _decode(kind, payload)
            if frame is not None:
                yield frame


def _decode(kind: int, payload: bytes) -> Frame | None:  # noqa: PLR0911 - one a type
    match kind:
        case FrameType.HELLO:
            _need(kind, payload, 2)
            return Hello(payload[0], bool(payload[1] & HELLO_LOGS))
        case FrameType.STATUS:
            _need(kind, payload, 2)
            if payload[0] not in list(StatusKind):
                raise ProtocolError(f"status from init: kind {payload[0]}, expected 0 to {max(StatusKind)}")
            return Status(StatusKind(payload[0]), payload[1], payload[2:].decode(errors="replace"))
        case FrameType.STDOUT:
            return Stdout(payload)
        case FrameType.STDERR:
            return Stderr(payload)
        case FrameType.LOST:
            _need(kind, payload, 8)
            return Lost(int.from_bytes(payload[:8], "big"))
        case FrameType.ACK:
            return Ack()
        case FrameType.STOP:
            _need(kind, payload, STOP.size)
            return Stop(*STOP.unpack_from(payload))
    return None


def _need(kind: int, payload: bytes, size: int) -> None:
    if len(payload) < size:
        raise ProtocolError(f"frame 0x{kind:02x}: need {size} bytes, have {len(payload)}")
