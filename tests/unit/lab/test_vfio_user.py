# SPDX-License-Identifier: Apache-2.0
"""vfio-user: what QEMU says and hears, interrupts, and peers that break the protocol: one error, nothing kept."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vfio_client import VfioClient

from enclavekit.errors import ProtocolError
from enclavekit.lab.dma import DmaMaps
from enclavekit.lab.interrupts import Interrupts
from enclavekit.lab.vfio_user import TRANSITIONS, State, VfioUser
from enclavekit.lab.vfio_user_message import (
    DEVICE_INFO,
    DMA_MAP,
    DMA_UNMAP,
    HEADER,
    IRQ_INFO,
    MAX_DATA,
    MAX_MESSAGE,
    REGION_ACCESS,
    REGION_INFO,
    SET_IRQS,
    VERSION,
    Command,
    Flags,
)

PAGE = 4096
EVENTFDS, NO_DATA = 0x24, 0x21


class FakeDevice:
    """Two regions of bytes."""

    def __init__(self) -> None:
        self.regions = {3: 4096, 7: 256}
        self.data = {region: bytearray(size) for region, size in self.regions.items()}
        self.resets = 0

    def read(self, region: int, offset: int, size: int) -> bytes:
        return bytes(self.data[region][offset : offset + size])

    def write(self, region: int, offset: int, data: bytes) -> None:
        self.data[region][offset : offset + len(data)] = data

    def reset(self) -> None:
        self.resets += 1


class Rig:
    """Both ends in one thread. ``open_fds`` are those that the server has made or kept."""

    def __init__(self) -> None:
        self.before = open_fds()
        theirs, ours = socket.socketpair()
        self.device, self.memory, self.interrupts = FakeDevice(), DmaMaps(), Interrupts(2)
        self.server = VfioUser(theirs, self.device, self.memory, self.interrupts)
        self.client = VfioClient(ours, self.server.process)

    def close(self) -> None:
        self.server.close()
        self.server.close()
        self.client.transport.close()
        assert open_fds() == self.before


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def _no_garbage() -> None:
    """What other tests left must not be closed while descriptors are counted here."""
    gc.collect()


@pytest.fixture
def new() -> Iterator[Rig]:
    """Nothing was said yet."""
    made = Rig()
    yield made
    made.close()


@pytest.fixture
def rig(new: Rig) -> Rig:
    new.client.negotiate()
    return new


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
    yield fds
    for fd in fds:
        os.close(fd)


def test_what_qemu_asks_first(new: Rig) -> None:
    said = new.client.negotiate()
    assert said[-1:] == b"\0"
    assert json.loads(said[:-1]) == {
        "capabilities": {"max_msg_fds": 8, "max_data_xfer_size": 4096, "max_dma_maps": 256, "pgsizes": 4096}
    }
    assert new.client.ask(Command.DEVICE_GET_INFO, bytes(16)) == DEVICE_INFO.pack(16, 3, 9, 5)
    for index, size in enumerate([0, 0, 0, 4096, 0, 0, 0, 256, 0]):
        asked = REGION_INFO.pack(32, 0, index, 0, 0, 0)
        told = REGION_INFO.pack(32, 3 if size else 0, index, 0, size, 0)
        assert new.client.ask(Command.DEVICE_GET_REGION_INFO, asked) == told
    for index, count in enumerate([0, 0, 2, 0, 0]):
        told = IRQ_INFO.pack(16, 1, index, count)
        assert new.client.ask(Command.DEVICE_GET_IRQ_INFO, IRQ_INFO.pack(16, 0, index, 0)) == told
    new.client.ask(Command.DEVICE_RESET)
    assert new.device.resets == 1


def test_regions(rig: Rig) -> None:
    rig.client.write(3, 4092, b"last", posted=True)
    rig.client.write(7, 0, b"\x01", posted=False)
    assert rig.client.read(3, 4092, 4) == b"last"
    assert rig.client.read(7, 0, 2) == b"\x01\0"
    assert rig.client.read(3, 0, 4096) == bytes(4092) + b"last"
    assert rig.client.read(3, 4096, 0) == b""


def test_interrupts(rig: Rig, eventfds: list[int]) -> None:
    rig.interrupts.signal(0)  # lost
    rig.client.set_eventfds(eventfds)
    rig.interrupts.signal(1)
    rig.interrupts.signal(1)
    assert os.eventfd_read(eventfds[1]) == 2
    os.eventfd_write(eventfds[0], 0xFFFF_FFFF_FFFF_FFFE)
    rig.interrupts.signal(0)  # is full of signals
    assert os.eventfd_read(eventfds[0]) == 0xFFFF_FFFF_FFFF_FFFE
    rig.client.set_eventfds([eventfds[0]], start=1)
    rig.interrupts.signal(1)
    assert os.eventfd_read(eventfds[0]) == 1
    rig.client.set_eventfds([], start=1, count=1)
    rig.interrupts.signal(1)
    rig.client.set_eventfds(eventfds)
    rig.client.ask(Command.DEVICE_SET_IRQS, SET_IRQS.pack(20, NO_DATA, 2, 0, 0))
    rig.client.ask(Command.DEVICE_SET_IRQS, SET_IRQS.pack(20, NO_DATA, 0, 0, 0))
    rig.interrupts.signal(0)
    for fd in eventfds:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)


def test_what_is_not_there_is_answered(rig: Rig) -> None:
    for command, body, number in (
        (Command.DEVICE_GET_REGION_IO_FDS, b"", errno.ENOTSUP),
        (Command.REGION_WRITE_MULTI, b"", errno.ENOTSUP),
        (Command.DMA_UNMAP, DMA_UNMAP.pack(24, 1, 0, PAGE), errno.EINVAL),
        (Command.DEVICE_SET_IRQS, SET_IRQS.pack(20, 0x22, 2, 0, 2), errno.EINVAL),
    ):
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            rig.client.ask(command, body)
        assert caught.value.errno == number
    rig.client.ask(Command.DEVICE_RESET)


def test_messages_in_pieces(new: Rig) -> None:
    message = HEADER.pack(7, Command.VERSION, HEADER.size + VERSION.size, 0, 0) + VERSION.pack(0, 0)
    for place in range(len(message)):
        assert new.server.state is State.WAITING
        new.client.transport.send(message[place : place + 1])
        new.server.process()
    assert new.server.state is State.READY
    number, command, _, flags, _ = HEADER.unpack(new.client.transport.recv(HEADER.size))
    assert (number, command, flags) == (7, Command.VERSION, Flags.REPLY)


@pytest.mark.parametrize("sent", [b"", b"\1", HEADER.pack(1, 1, 100, 0, 0) + b"half"])
def test_the_client_goes(new: Rig, sent: bytes) -> None:
    if sent:
        new.client.transport.send(sent)
    new.client.transport.close()
    new.server.process()
    assert new.server.ended


def test_the_client_goes_without_reading(rig: Rig) -> None:
    rig.client.transport.send(HEADER.pack(1, Command.DEVICE_GET_INFO, 32, 0, 0) + bytes(16))
    rig.client.transport.close()
    rig.server.process()
    assert rig.server.ended


def test_no_client_keeps_the_thread(rig: Rig) -> None:
    message = HEADER.pack(1, Command.REGION_WRITE, 33, Flags.NO_REPLY, 0) + REGION_ACCESS.pack(0, 3, 1) + b"x"
    rig.client.transport.send(message * 65)
    assert rig.server.process()
    assert not rig.server.process()


def send(command: int, body: bytes = b"", flags: int = 0) -> Callable[[Rig], object]:
    return lambda rig: rig.client.send(command, body, flags=flags)


def region_info(index: int) -> bytes:
    return REGION_INFO.pack(32, 0, index, 0, 0, 0)


def two_maps(rig: Rig) -> None:
    rig.client.map(0, 4 * PAGE)
    rig.client.map(PAGE, PAGE)


def half_an_unmap(rig: Rig) -> None:
    rig.client.map(0, 2 * PAGE)
    rig.client.unmap(0, PAGE)


def many_maps(rig: Rig) -> None:
    for number in range(257):
        rig.client.map(number * PAGE, PAGE)


def only_a_head(size: int) -> Callable[[Rig], object]:
    def act(rig: Rig) -> None:
        rig.client.transport.send(HEADER.pack(1, 10, size, 0, 0))
        rig.server.process()

    return act


BROKEN: dict[str, Callable[[Rig], object]] = {
    "command 99 is not known": send(99),
    "command 0 is not known": send(0),
    "command 11 is not known": send(11),  # the server's own: read memory
    "VERSION is not expected in state 'ready'": send(Command.VERSION, bytes(4)),
    "command 4: flags 0x1, expected those of a request": send(Command.DEVICE_GET_INFO, bytes(16), 1),
    "command 4: flags 0x20, expected those of a request": send(Command.DEVICE_GET_INFO, bytes(16), 0x20),
    f"command 10: 15 bytes, expected 16 to {MAX_MESSAGE}": only_a_head(15),
    f"command 10: {MAX_MESSAGE + 1} bytes, expected 16 to {MAX_MESSAGE}": only_a_head(MAX_MESSAGE + 1),
    "DEVICE_GET_INFO: 15 bytes, expected 16": send(Command.DEVICE_GET_INFO, bytes(15)),
    "DEVICE_RESET: 1 bytes, expected none": send(Command.DEVICE_RESET, b"x"),
    "region 9, a PCI device has 9": send(Command.DEVICE_GET_REGION_INFO, region_info(9)),
    "DEVICE_GET_IRQ_INFO: interrupts of kind 5, a PCI device has 5": send(
        Command.DEVICE_GET_IRQ_INFO, IRQ_INFO.pack(16, 0, 5, 0)
    ),
    "REGION_READ: 1 bytes at 0x1000 of region 3, which has 4096": send(
        Command.REGION_READ, REGION_ACCESS.pack(4096, 3, 1)
    ),
    "REGION_READ: 4294967295 bytes at 0xffffffffffffffff of region 3, which has 4096": send(
        Command.REGION_READ, REGION_ACCESS.pack((1 << 64) - 1, 3, (1 << 32) - 1)
    ),
    "REGION_READ: 1 bytes at 0x0 of region 0, which has 0": send(Command.REGION_READ, REGION_ACCESS.pack(0, 0, 1)),
    "REGION_WRITE: 2 bytes at 0xff of region 7, which has 256": send(
        Command.REGION_WRITE, REGION_ACCESS.pack(255, 7, 2) + b"ab"
    ),
    "REGION_WRITE: 15 bytes, expected 16 and more": send(Command.REGION_WRITE, bytes(15)),
    "REGION_WRITE: 1 bytes of data, expected 2": send(Command.REGION_WRITE, REGION_ACCESS.pack(0, 3, 2) + b"a"),
    "vectors 1 to 3 of kind 2, there are 2": send(
        Command.DEVICE_SET_IRQS, SET_IRQS.pack(20, EVENTFDS, 2, 1, 2)
    ),
    "vectors 0 to 1 of kind 0, there are 0": send(Command.DEVICE_SET_IRQS, SET_IRQS.pack(20, EVENTFDS, 0, 0, 1)),
    "1 eventfds for 2 vectors": lambda rig: rig.client.set_eventfds([0], count=2),
    "what comes along for an interrupt is no eventfd": lambda rig: rig.client.set_eventfds([rig.server.fileno()]),
    "DEVICE_GET_INFO: 1 descriptors, expected at most 0": lambda rig: (
        rig.client.send(Command.DEVICE_GET_INFO, bytes(16), [0])
    ),
    "DMA_MAP: 2 descriptors, expected at most 1": lambda rig: (
        rig.client.send(Command.DMA_MAP, DMA_MAP.pack(32, 3, 0, 0, PAGE), [0, 0])
    ),
    "a message with more than 8 descriptors, or than we may have": lambda rig: (
        rig.client.send(Command.DEVICE_SET_IRQS, bytes(20), [0] * 9)
    ),
    "DMA map at 0x0000000000001000: size 0x0 and offset 0x0 are not of whole pages": lambda rig: (
        rig.client.map(PAGE, 0)
    ),
    "DMA map at 0x0000000000000001: size 0x1000 and offset 0x0 are not of whole pages": lambda rig: (
        rig.client.map(1, PAGE)
    ),
    "DMA map at 0xfffffffffffff000: size 0x2000 and flags 0x3 are not within bounds": lambda rig: (
        rig.client.map((1 << 64) - PAGE, 2 * PAGE)
    ),
    "DMA map at 0x0000000000000000: size 0x1000 and flags 0x7 are not within bounds": lambda rig: (
        rig.client.map(0, PAGE, flags=7)
    ),
    "DMA map at 0x0000000000001000: size 0x1000 overlaps the one at 0x0000000000000000": two_maps,
    "DMA map at 0x0000000000000000: what comes along is no file of 0x1000 bytes and more": lambda rig: (
        rig.client.map(0, PAGE, rig.server.fileno())
    ),
    "DMA unmap at 0x0000000000000000: no map of size 0x1000 is there": half_an_unmap,
    "DMA map at 0x0000000000100000: 256 are there already, which is the limit": many_maps,
    "the client does not read its replies": lambda rig: [
        rig.client.send(Command.REGION_READ, REGION_ACCESS.pack(0, 3, MAX_DATA)) for _ in range(1000)
    ],
}  # fmt: skip


@pytest.mark.parametrize("message", BROKEN)
def test_a_client_that_breaks_the_protocol(rig: Rig, message: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        BROKEN[message](rig)
    assert str(caught.value) == f"vfio-user: {message}"
    assert rig.server.ended


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (bytes(3), "VERSION: 3 bytes, expected 4 and more"),
        (VERSION.pack(1, 0), "version 1, expected 0"),
    ],
)
def test_no_version_that_we_speak(new: Rig, body: bytes, message: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        new.client.send(Command.VERSION, body)
    assert str(caught.value) == f"vfio-user: {message}"


def test_nothing_before_the_version(new: Rig) -> None:
    with pytest.raises(ProtocolError) as caught:
        new.client.send(Command.DEVICE_RESET)
    assert str(caught.value) == "vfio-user: DEVICE_RESET is not expected in state 'waiting for the version'"


def test_the_table_has_all_states_and_commands() -> None:
    assert set(TRANSITIONS) == set(State)
    assert set(TRANSITIONS[State.READY]) | set(TRANSITIONS[State.WAITING]) == set(Command)


def test_too_many_files(rig: Rig) -> None:
    fds = [os.memfd_create("one", os.MFD_CLOEXEC) for _ in range(17)]
    try:
        for fd in fds:
            os.ftruncate(fd, PAGE)
        for number, fd in enumerate(fds[:16]):
            rig.client.map(number * PAGE, PAGE, fd)
        with pytest.raises(ProtocolError, match=r"a file more than the 16 that there may be$"):
            rig.client.map(16 * PAGE, PAGE, fds[16])
    finally:
        for fd in fds:
            os.close(fd)


def test_memory_that_is_found(rig: Rig, file: int) -> None:
    rig.client.map(4 * PAGE, 4 * PAGE, file, 8 * PAGE)
    rig.client.map(0, 4 * PAGE, file, 4 * PAGE)
    rig.client.map(8 * PAGE, PAGE, file, 0)
    rig.client.map(10 * PAGE, PAGE, file, 0)
    rig.client.map(11 * PAGE, PAGE)
    rig.client.map(12 * PAGE, PAGE, file, flags=1)
    (piece,) = rig.memory.find(PAGE, 6 * PAGE)
    assert (piece.address, piece.size, piece.offset) == (PAGE, 6 * PAGE, 5 * PAGE)
    assert [(one.size, one.offset) for one in rig.memory.find(6 * PAGE, 3 * PAGE)] == [
        (2 * PAGE, 10 * PAGE), (PAGE, 0)
    ]  # fmt: skip
    for address, size in ((8, 2), (9, 1), (10, 2), (11, 1), (12, 1), (13, 1), (0, 1 << 40)):
        assert rig.memory.find(address * PAGE, size * PAGE) == []


def test_memory_outlives_its_maps(rig: Rig, file: int) -> None:
    """Firmware takes maps down and makes them again; who has found one keeps it."""
    os.pwrite(file, b"donated", PAGE)
    rig.client.map(0, 4 * PAGE, file)
    (piece,) = rig.memory.find(PAGE, PAGE)
    kept = open_fds()
    rig.client.unmap(0, 4 * PAGE)
    assert rig.memory.find(PAGE, PAGE) == []
    assert os.pread(piece.fd, 7, piece.offset) == b"donated"
    rig.client.map(0, 4 * PAGE, file)
    rig.client.map(4 * PAGE, 4 * PAGE, file, 4 * PAGE)
    rig.client.unmap(0, 0, flags=2)
    assert open_fds() == kept


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """Only so many descriptors more can be had."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    filling = [os.dup(0)]
    while filling[-1] < highest:
        filling.append(os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (filling[-1] + 1 + count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in filling:
            os.close(fd)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "a message with more than 8 descriptors, or than we may have"),
        (1, "DMA map at 0x0000000000000000: cannot keep its file open: too many open files"),
    ],
)
def test_no_descriptor_left_for_a_file(rig: Rig, file: int, count: int, message: str) -> None:
    with room_for(count), pytest.raises(ProtocolError) as caught:
        rig.client.map(0, PAGE, file)
    assert str(caught.value) == f"vfio-user: {message}"


def test_no_descriptor_left_for_an_interrupt(rig: Rig, eventfds: list[int]) -> None:
    with room_for(3), pytest.raises(ProtocolError) as caught:
        rig.client.set_eventfds(eventfds)
    assert str(caught.value) == "vfio-user: cannot keep an eventfd open: too many open files"


PIECES = st.one_of(
    st.builds(
        lambda code, flags, body: HEADER.pack(1, code, HEADER.size + len(body), flags, 0) + body,
        st.sampled_from([*Command, 0, 99]),
        st.sampled_from([0, 0, 0, 1, 0x10, 0x20]),
        st.one_of(
            st.binary(max_size=64),
            st.builds(
                lambda layout, words: layout.pack(*words[: len(layout.unpack(bytes(layout.size)))]),
                st.sampled_from([DMA_MAP, DMA_UNMAP, SET_IRQS, REGION_ACCESS, IRQ_INFO, REGION_INFO]),
                st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 9, 0x24, 4096, 0xFFFF_FFFF]), min_size=6, max_size=6),
            ),
        ),
    ),
    st.binary(max_size=40),
)


@settings(max_examples=200, deadline=None)
@given(st.booleans(), st.lists(st.tuples(PIECES, st.integers(0, 9)), max_size=8))
def test_any_bytes(negotiated: bool, pieces: list[tuple[bytes, int]]) -> None:
    """Nothing but our error, and no descriptor is kept."""
    rig = Rig()
    rig.client.transport.setblocking(False)
    try:
        if negotiated:
            rig.client.negotiate()
        with suppress(ProtocolError):
            for data, fds in pieces:
                socket.send_fds(rig.client.transport, [data or b"\0"], [2] * fds)
                rig.server.process()
                assert not rig.server.ended
    finally:
        rig.close()  # looks for descriptors that were left
