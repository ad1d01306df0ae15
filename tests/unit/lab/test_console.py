# SPDX-License-Identifier: Apache-2.0
"""Consoles: many readers, late ones, slow ones, ones that go; none holds the enclave up."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from enclavekit.lab.console import KEPT, MAX_READERS, Console
from enclavekit.virtio.loop import Loop

TIMEOUT_S = 20.0


class Rig:
    """A console in its loop's thread, and the other end of the serial line."""

    def __init__(self) -> None:
        source, self.serial = socket.socketpair()
        self.serial.settimeout(TIMEOUT_S)
        source.setblocking(False)
        self.source = source
        self.loop = Loop(self._work, self._end)
        self.console = Console(self.loop, source.fileno())
        self.loop.start("console")

    def _work(self) -> bool:
        return self.console.work()

    def _end(self) -> None:
        self.console.close()

    def reader(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.settimeout(TIMEOUT_S)
        self.console.attach(theirs)
        return ours

    def close(self) -> None:
        self.loop.stop()
        self.source.close()
        self.serial.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()
    assert rig.loop.error is None


def read(reader: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = reader.recv(count - len(data))
        assert part, f"ended after {data[-100:]!r}"
        data += part
    return data


def rest(reader: socket.socket) -> bytes:
    """All, up to the end."""
    with reader.makefile("rb") as file:
        return file.read()


def test_who_comes_late_sees_it_all(rig: Rig) -> None:
    rig.serial.sendall(b"Linux version")
    first = rig.reader()
    assert read(first, 13) == b"Linux version"
    second = rig.reader()
    assert read(second, 13) == b"Linux version"
    rig.serial.sendall(b", and more")
    for reader in (first, second):
        assert read(reader, 10) == b", and more"
        reader.close()


def test_who_does_not_read_holds_nobody_up_and_misses_what_is_too_old(rig: Rig) -> None:
    idle, eager = rig.reader(), rig.reader()
    lines = b"".join(b"%09d\n" % number for number in range(4 * KEPT // 10))
    for start in range(0, len(lines), 1 << 14):
        part = lines[start : start + (1 << 14)]
        rig.serial.sendall(part)
        assert read(eager, len(part)) == part
    rig.loop.stop()
    missed = rest(idle)
    assert lines.startswith(missed[:10])
    assert len(missed) < len(lines)
    assert rest(eager) == b""
    idle.close()
    eager.close()


def test_who_reads_again_goes_on_with_what_is_kept(rig: Rig) -> None:
    slow, eager = rig.reader(), rig.reader()
    text = os.urandom(6 * KEPT)
    for start in range(0, len(text), 1 << 14):
        rig.serial.sendall(text[start : start + (1 << 14)])
        read(eager, 1 << 14)
    seen = b""
    while not seen.endswith(text[-100:]):
        part = slow.recv(1 << 16)
        assert part
        seen += part
    assert text[-KEPT:] in seen
    slow.close()
    eager.close()


def test_nobody_writes_to_a_console(rig: Rig) -> None:
    reader = rig.reader()
    rig.serial.sendall(b"x")
    assert read(reader, 1) == b"x"
    with pytest.raises(BrokenPipeError):
        reader.sendall(b"input")
    reader.close()


def test_a_reader_that_goes_is_forgotten(rig: Rig) -> None:
    for _ in range(MAX_READERS + 1):
        reader = rig.reader()
        rig.serial.sendall(b"x")
        assert read(reader, 1) == b"x"
        reader.close()


def test_one_reader_too_many_is_hung_up_on(rig: Rig) -> None:
    readers = [rig.reader() for _ in range(MAX_READERS + 1)]
    assert readers[-1].recv(1) == b""
    rig.serial.sendall(b"x")
    assert [reader.recv(1) for reader in readers[:-1]] == [b"x"] * MAX_READERS
    for reader in readers:
        reader.close()


def test_the_last_words_arrive_and_then_the_end(rig: Rig) -> None:
    reader = rig.reader()
    rig.serial.sendall(b"x")
    assert read(reader, 1) == b"x"
    rig.serial.sendall(b"Kernel panic - not syncing")
    rig.loop.stop()
    assert rest(reader) == b"Kernel panic - not syncing"
    reader.close()


def test_a_machine_that_has_ended_has_no_console(rig: Rig) -> None:
    rig.loop.stop()
    reader = rig.reader()
    assert reader.recv(1) == b""
    reader.close()
