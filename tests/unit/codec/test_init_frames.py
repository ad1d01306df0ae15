# SPDX-License-Identifier: Apache-2.0
"""Frames of init's control connection: known bytes, round trips, and whatever a broken or hostile peer may send."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.codec.init_frames import (
    MAX_MESSAGE,
    MAX_NONCE,
    MAX_PAYLOAD,
    Ack,
    Attest,
    AttestationDocument,
    Decoder,
    Frame,
    FrameType,
    Hello,
    Lost,
    Start,
    Started,
    Status,
    StatusKind,
    Stderr,
    Stdout,
    Stop,
    Value,
    encode,
)
from enclavekit.errors import ProtocolError

# As docs/init.md has them: these bytes never change, for images that speak them live on.
KNOWN: list[tuple[Frame, str]] = [
    (Hello(), "01 00000002 01 00"),
    (Hello(logs=True), "01 00000002 01 01"),
    (Status(StatusKind.EXITED, 42), "02 00000002 00 2a"),
    (Status(StatusKind.SIGNALLED, 9), "02 00000002 01 09"),
    (Status(StatusKind.FAILED, 0, "no"), "02 00000004 02 00 6e6f"),
    (Stdout(b"a\n"), "03 00000002 610a"),
    (Stderr(b""), "04 00000000"),
    (Lost(0x1_0000_0001), "05 00000008 0000000100000001"),
    (Ack(), "81 00000000"),
    (Stop(0, 5000), "82 00000005 00 00001388"),
    (Stop(10, 0), "82 00000005 0a 00000000"),
    (Hello(waits=True), "01 00000002 01 02"),
    (Value(b"KEY", b"v\n"), "83 00000006 03 4b4559 760a"),
    (Value(b"a", b""), "83 00000002 01 61"),
    (Start(), "84 00000000"),
    (Started(), "06 00000000"),
    (Hello(attests=True), "01 00000002 01 04"),
    (Attest(7, b"\xaa\xbb"), "85 00000006 00000007 aabb"),
    (AttestationDocument(7, b"\x84\x44"), "07 00000007 00000007 00 8444"),
    (AttestationDocument(0xFFFFFFFF, None, "no"), "07 00000007 ffffffff 01 6e6f"),
]

PRINTABLE = st.text(max_size=MAX_MESSAGE // 4).filter(str.isprintable)
FRAMES = st.one_of(
    st.builds(Hello, st.just(1), st.booleans(), st.booleans(), st.booleans()),
    st.builds(Attest, st.integers(0, 0xFFFFFFFF), st.binary(min_size=1, max_size=MAX_NONCE)),
    st.builds(AttestationDocument, st.integers(0, 0xFFFFFFFF), st.binary(min_size=1, max_size=300)),
    st.builds(AttestationDocument, st.integers(0, 0xFFFFFFFF), st.none(), PRINTABLE),
    st.builds(Status, st.just(StatusKind.EXITED), st.integers(0, 255)),
    st.builds(Status, st.just(StatusKind.SIGNALLED), st.integers(1, 64)),
    st.builds(Status, st.just(StatusKind.FAILED), st.just(0), PRINTABLE),
    st.builds(Stdout, st.binary(max_size=300)),
    st.builds(Stderr, st.binary(max_size=300)),
    st.builds(Lost, st.integers(0, 2**64 - 1)),
    st.just(Ack()),
    st.builds(Stop, st.integers(0, 64), st.integers(0, 2**32 - 1)),
    st.builds(Value, st.binary(max_size=255), st.binary(max_size=300)),
    st.just(Start()),
    st.just(Started()),
)


def decode(data: bytes) -> list[Frame]:
    return list(Decoder().feed(data))


@pytest.mark.parametrize(("frame", "known"), KNOWN)
def test_known_bytes(frame: Frame, known: str) -> None:
    data = bytes.fromhex(known)
    assert encode(frame) == data
    assert decode(data) == [frame]


@given(frames=st.lists(FRAMES, max_size=8), size=st.integers(1, 400))
def test_frames_come_out_as_they_went_in_however_they_are_cut(frames: list[Frame], size: int) -> None:
    data = b"".join(encode(frame) for frame in frames)
    decoder = Decoder()
    got = [frame for at in range(0, len(data), size) for frame in decoder.feed(data[at : at + size])]
    assert got == frames


def test_the_longest_payload() -> None:
    frame = Stdout(bytes(MAX_PAYLOAD))
    assert decode(encode(frame)) == [frame]
    with pytest.raises(ValueError, match=r"^payload of 65537 bytes, expected at most 65536$"):
        encode(Stdout(bytes(MAX_PAYLOAD + 1)))


@pytest.mark.parametrize("kind", [0x00, 0x08, 0x7F, 0x80, 0x86, 0xFF])
def test_unknown_types_are_skipped(kind: int) -> None:
    unknown = bytes([kind]) + (3).to_bytes(4, "big") + b"new"
    assert decode(unknown + encode(Ack())) == [Ack()]


def test_unknown_hello_flags_are_ignored() -> None:
    assert decode(bytes.fromhex("01 00000002 01 f8")) == [Hello(logs=False)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("03 00010001", "control frame 0x03: 65537 bytes, expected at most 65536"),
        ("77 ffffffff", "control frame 0x77: 4294967295 bytes, expected at most 65536"),
        ("01 00000001 01", "control frame 0x01: 1 bytes, expected 2"),
        ("01 00000003 01 00 00", "control frame 0x01: 3 bytes, expected 2"),
        ("01 00000002 02 00", "hello frame: protocol version 2, expected 1"),
        ("02 00000001 00", "status frame: 1 bytes, expected 2 to 1026"),
        ("02 00000403" + "02" + "00" * 1026, "status frame: 1027 bytes, expected 2 to 1026"),
        ("02 00000002 03 00", "status frame: kind 3, expected 0 to 2"),
        ("02 00000002 01 00", "status frame: signal 0, expected 1 to 64"),
        ("02 00000002 01 41", "status frame: signal 65, expected 1 to 64"),
        ("05 00000007 00000000000000", "control frame 0x05: 7 bytes, expected 8"),
        ("81 00000001 00", "control frame 0x81: 1 bytes, expected 0"),
        ("82 00000004 00000000", "control frame 0x82: 4 bytes, expected 5"),
        ("83 00000000", "value frame: 0 bytes, expected at least 1"),
        ("83 00000003 03 4b45", "value frame: 3 bytes, expected at least 4"),
        ("06 00000001 00", "control frame 0x06: 1 bytes, expected 0"),
        ("84 00000001 00", "control frame 0x84: 1 bytes, expected 0"),
        ("82 00000005 41 00000000", "stop frame: signal 65, expected 0 to 64"),
    ],
)
def test_a_broken_frame_is_an_error_after_the_good_ones(data: str, message: str) -> None:
    frames = Decoder().feed(encode(Ack()) + bytes.fromhex(data))
    assert next(frames) == Ack()
    with pytest.raises(ProtocolError) as caught:
        next(frames)
    assert caught.value.message == message


def test_a_message_is_made_fit_for_a_terminal() -> None:
    data = b"\x02\x00\x00\x00\x09\x02\x00a\x1b[2J\n\xff"
    assert decode(data) == [Status(StatusKind.FAILED, 0, "a\ufffd[2J\ufffd\ufffd")]


def test_bytes_are_taken_even_if_nobody_looks_at_the_frames_yet() -> None:
    decoder = Decoder()
    decoder.feed(encode(Ack()))
    assert list(decoder.feed(encode(Lost(1)))) == [Ack(), Lost(1)]


FRAMED = st.builds(
    lambda kind, payload: bytes([kind]) + len(payload).to_bytes(4, "big") + payload,
    st.sampled_from([*FrameType]),
    st.binary(max_size=12),
)


@given(st.lists(st.one_of(FRAMED, st.binary(max_size=64)), max_size=16))
def test_any_bytes_are_frames_or_our_error(parts: list[bytes]) -> None:
    decoder = Decoder()
    with contextlib.suppress(ProtocolError):
        for part in parts:
            assert all(isinstance(frame, Frame) for frame in decoder.feed(part))
