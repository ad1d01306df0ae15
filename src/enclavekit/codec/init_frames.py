# SPDX-License-Identifier: Apache-2.0
"""Frames of the control connection between the host and init (docs/init.md). No I/O.

A frame is a 5-byte header, type and payload length, and the payload. Frames of types that are not known are skipped on
either side, so images and hosts of different age understand each other. Neither side trusts the other: whatever a peer
sends is a frame, is skipped, or is a ``ProtocolError``, and never takes more memory than the longest frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

from enclavekit.errors import ProtocolError

PROTOCOL_VERSION = 1
MAX_PAYLOAD = 1 << 16
MAX_MESSAGE = 1024
MAX_SIGNAL = 64
MAX_NONCE = 1024
MAX_DOCUMENT = 0x3000
HELLO_LOGS = 1
HELLO_WAITS = 2
HELLO_ATTESTS = 4
"""Flags; unknown ones are ignored."""

HEADER = Struct(
    ">"  #  big-endian, no padding
    "B"  # 0x0 type
    "I"  # 0x1 payload length, bytes
)
HELLO = Struct(
    ">"
    "B"  # 0x0 protocol version
    "B"  # 0x1 flags
)
STATUS = Struct(
    ">"
    "B"  # 0x0 kind
    "B"  # 0x1 exit code or signal number, 0 for a failure
    #      0x2 a failure's message, UTF-8
)
VALUE = Struct(
    ">B"  # 0x0 size of the name
    #       0x1 name, and the value in what is left
)
LOST = Struct(
    ">Q"  # 0x0 bytes
)
DOCUMENT = Struct(
    ">"
    "I"  # 0x0 tag, of the request
    "B"  # 0x4 kind
    #      0x5 the document, or why there is none, UTF-8
)
ATTEST = Struct(
    ">I"  # 0x0 tag, which comes back with the answer
    #       0x4 nonce
)
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
    STARTED = 0x06
    DOCUMENT = 0x07
    ACK = 0x81
    STOP = 0x82
    VALUE = 0x83
    START = 0x84
    ATTEST = 0x85


class DocumentKind(IntEnum):
    """Whether there is one."""

    GIVEN = 0
    FAILED = 1


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
    """Whether the image gives the application's output to the host."""
    waits: bool = False
    """For ``Value`` and ``Start``: the image declares launch values."""
    attests: bool = False
    """Whether it answers ``Attest``."""


@dataclass(frozen=True, slots=True)
class Status:
    """The end: an exit code, a signal number, or what init could not do, in one printable line."""

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
    """Bytes of output that init had to drop here, because nobody took them."""

    count: int


@dataclass(frozen=True, slots=True)
class Started:
    """The application runs."""


@dataclass(frozen=True, slots=True)
class AttestationDocument:
    """The answer to the ``Attest`` of that tag: a document, or in a printable line why there is none."""

    tag: int
    document: bytes | None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Attest:
    """Make an attestation document with this nonce, 1 to 1024 bytes. One at a time."""

    tag: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Ack:
    """The host has the status: init may go."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Send the application a signal (0: the image's stop signal), and after the grace SIGKILL."""

    signal: int = 0
    grace_ms: int = 0


@dataclass(frozen=True, slots=True)
class Value:
    """A value that the image declares, given at launch; together at most 65535 bytes."""

    name: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Start:
    """There are no more values: the application may start."""


FromInit = Hello | Status | Stdout | Stderr | Lost | Started | AttestationDocument
Frame = FromInit | Ack | Stop | Value | Start | Attest


def encode(frame: Frame) -> bytes:  # noqa: PLR0912 - one a type
    """Header and payload."""
    match frame:
        case Hello(version, logs, waits, attests):
            flags = (HELLO_LOGS if logs else 0) | (HELLO_WAITS if waits else 0) | (HELLO_ATTESTS if attests else 0)
            kind, payload = FrameType.HELLO, HELLO.pack(version, flags)
        case Status(status, value, message):
            kind, payload = FrameType.STATUS, STATUS.pack(status, value) + message.encode()
        case Stdout(data):
            kind, payload = FrameType.STDOUT, data
        case Stderr(data):
            kind, payload = FrameType.STDERR, data
        case Lost(count):
            kind, payload = FrameType.LOST, LOST.pack(count)
        case Started():
            kind, payload = FrameType.STARTED, b""
        case Ack():
            kind, payload = FrameType.ACK, b""
        case Stop(signal, grace_ms):
            kind, payload = FrameType.STOP, STOP.pack(signal, grace_ms)
        case Value(name, value):
            kind, payload = FrameType.VALUE, VALUE.pack(len(name)) + name + value
        case Start():
            kind, payload = FrameType.START, b""
        case AttestationDocument(tag, document, message):
            answer = DocumentKind.FAILED if document is None else DocumentKind.GIVEN
            kind, payload = FrameType.DOCUMENT, DOCUMENT.pack(tag, answer) + (document or message.encode())
        case Attest(tag, nonce):
            kind, payload = FrameType.ATTEST, ATTEST.pack(tag) + nonce
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
        return self._frames()

    def _frames(self) -> Iterator[Frame]:
        while len(self._pending) >= HEADER.size:
            kind, length = HEADER.unpack_from(self._pending)
            if length > MAX_PAYLOAD:
                raise ProtocolError(f"control frame 0x{kind:02x}: {length} bytes, expected at most {MAX_PAYLOAD}")
            if len(self._pending) < HEADER.size + length:
                return
            payload = bytes(self._pending[HEADER.size : HEADER.size + length])
            del self._pending[: HEADER.size + length]
            frame = _decode(kind, payload)
            if frame is not None:
                yield frame


def _decode(kind: int, payload: bytes) -> Frame | None:  # noqa: PLR0911, PLR0912 - one a type
    match kind:
        case FrameType.HELLO:
            return _hello(payload)
        case FrameType.STATUS:
            return _status(payload)
        case FrameType.STDOUT:
            return Stdout(payload)
        case FrameType.STDERR:
            return Stderr(payload)
        case FrameType.LOST:
            _need_exactly(kind, payload, LOST.size)
            return Lost(*LOST.unpack(payload))
        case FrameType.STARTED:
            _need_exactly(kind, payload, 0)
            return Started()
        case FrameType.ACK:
            _need_exactly(kind, payload, 0)
            return Ack()
        case FrameType.START:
            _need_exactly(kind, payload, 0)
            return Start()
        case FrameType.VALUE:
            return _value(payload)
        case FrameType.DOCUMENT:
            return _document(payload)
        case FrameType.ATTEST:
            return _attest(payload)
        case FrameType.STOP:
            _need_exactly(kind, payload, STOP.size)
            signal, grace_ms = STOP.unpack(payload)
            if signal > MAX_SIGNAL:
                raise ProtocolError(f"stop frame: signal {signal}, expected 0 to {MAX_SIGNAL}")
            return Stop(signal, grace_ms)
    return None


def _hello(payload: bytes) -> Hello:
    _need_exactly(FrameType.HELLO, payload, HELLO.size)
    version, flags = HELLO.unpack(payload)
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"hello frame: protocol version {version}, expected {PROTOCOL_VERSION}")
    return Hello(version, bool(flags & HELLO_LOGS), bool(flags & HELLO_WAITS), bool(flags & HELLO_ATTESTS))


def _value(payload: bytes) -> Value:
    size = payload[0] if payload else 0
    if len(payload) < VALUE.size + size:
        raise ProtocolError(f"value frame: {len(payload)} bytes, expected at least {VALUE.size + size}")
    return Value(payload[1 : 1 + size], payload[1 + size :])


def _document(payload: bytes) -> AttestationDocument:
    if not DOCUMENT.size <= len(payload) <= DOCUMENT.size + MAX_DOCUMENT:
        raise ProtocolError(
            f"document frame: {len(payload)} bytes, expected {DOCUMENT.size} to {DOCUMENT.size + MAX_DOCUMENT}"
        )
    tag, kind = DOCUMENT.unpack_from(payload)
    rest = payload[DOCUMENT.size :]
    match kind:
        case DocumentKind.GIVEN:
            return AttestationDocument(tag, rest)
        case DocumentKind.FAILED:
            return AttestationDocument(tag, None, _printable(rest[:MAX_MESSAGE]))
    raise ProtocolError(f"document frame: kind {kind}, expected 0 to {max(DocumentKind)}")


def _attest(payload: bytes) -> Attest:
    if not ATTEST.size < len(payload) <= ATTEST.size + MAX_NONCE:
        raise ProtocolError(
            f"attest frame: {len(payload)} bytes, expected {ATTEST.size + 1} to {ATTEST.size + MAX_NONCE}"
        )
    (tag,) = ATTEST.unpack_from(payload)
    return Attest(tag, payload[ATTEST.size :])


def _printable(text: bytes) -> str:
    """It ends up on terminals: no control characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text.decode(errors="replace"))


def _status(payload: bytes) -> Status:
    if not STATUS.size <= len(payload) <= STATUS.size + MAX_MESSAGE:
        raise ProtocolError(
            f"status frame: {len(payload)} bytes, expected {STATUS.size} to {STATUS.size + MAX_MESSAGE}"
        )
    kind, value = STATUS.unpack_from(payload)
    if kind not in list(StatusKind):
        raise ProtocolError(f"status frame: kind {kind}, expected 0 to {max(StatusKind)}")
    if kind == StatusKind.SIGNALLED and not 1 <= value <= MAX_SIGNAL:
        raise ProtocolError(f"status frame: signal {value}, expected 1 to {MAX_SIGNAL}")
    return Status(StatusKind(kind), value, _printable(payload[STATUS.size :]))


def _need_exactly(kind: int, payload: bytes, size: int) -> None:
    if len(payload) != size:
        raise ProtocolError(f"control frame 0x{kind:02x}: {len(payload)} bytes, expected {size}")
