# SPDX-License-Identifier: Apache-2.0
"""Streams over sockets: what is reported when, and what becomes of errors."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from enclavekit.virtio.loop import Loop
from enclavekit.virtio.streams import SocketStream


class Rig:
    """A stream, the other side's socket, and the events that came in the last turn of the loop."""

    def __init__(self) -> None:
        self.loop = Loop(lambda: False, lambda: None)
        ours, self.other = socket.socketpair()
        self.other.setblocking(False)
        self.stream = SocketStream(self.loop, ours)
        self.events: list[int] = []
        self.stream.attach(self.events.append)

    def turn(self) -> list[int]:
        self.events.clear()
        self.loop._turn(True)
        return self.events

    def fill(self) -> bytes:
        """Send until it takes no more; returns what it took."""
        taken = b""
        while sent := self.stream.send([memoryview(bytes(50_000)), bytearray(b"x" * 50_000)]):
            taken += (bytes(50_000) + b"x" * 50_000)[:sent]
        return taken

    def drain(self) -> bytes:
        data = b""
        try:
            while block := self.other.recv(1 << 20):
                data += block
        except BlockingIOError:
            pass
        return data

    def close(self) -> None:
        self.stream.close()
        self.other.close()
        self.loop.stop()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_buffers_are_filled_one_after_the_other(rig: Rig) -> None:
    rig.other.send(b"abcde")
    assert rig.turn() == [select.EPOLLIN]
    parts = [memoryview(bytearray(2)), memoryview(bytearray(10))]
    assert rig.stream.receive(parts) == 5
    assert [bytes(part) for part in parts] == [b"ab", b"cde" + bytes(7)]
    assert rig.stream.receive(parts) is None


def test_room_is_reported_only_after_there_was_none(rig: Rig) -> None:
    assert rig.stream.send([memoryview(b"fits")]) == 4
    assert rig.drain() == b"fits"
    assert rig.turn() == []
    taken = rig.fill()
    assert rig.turn() == []
    assert rig.drain() == taken
    assert rig.turn() == [select.EPOLLOUT]
    assert rig.stream.send([memoryview(b"fits")]) == 4
    rig.drain()
    assert rig.turn() == []


def test_the_end_is_reported_and_read(rig: Rig) -> None:
    rig.other.shutdown(socket.SHUT_WR)
    assert rig.turn() == [select.EPOLLIN | select.EPOLLRDHUP]
    assert rig.stream.receive([memoryview(bytearray(1))]) == 0


def test_a_hang_up_is_more_than_the_end(rig: Rig) -> None:
    rig.other.close()
    assert rig.turn() == [select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP]
    with pytest.raises(BrokenPipeError):
        rig.stream.send([memoryview(b"x")])


def test_a_reset_is_an_end(rig: Rig) -> None:
    rig.stream.send([memoryview(b"never read")])
    rig.other.close()
    assert rig.stream.receive([memoryview(bytearray(1))]) == 0


def test_each_direction_ends_alone(rig: Rig) -> None:
    rig.stream.end()
    assert rig.other.recv(1) == b""
    rig.other.send(b"still heard")
    assert rig.stream.receive([memoryview(bytearray(20))]) == 11
    rig.stream.refuse()
    with pytest.raises(BrokenPipeError):
        rig.other.send(b"x")


def test_ending_what_is_gone_is_no_harm(rig: Rig) -> None:
    rig.loop.forget(rig.stream._socket.fileno())
    rig.stream._socket.close()
    rig.stream.end()
    rig.stream.refuse()
