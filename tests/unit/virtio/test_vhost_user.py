# SPDX-License-Identifier: Apache-2.0
"""vhost-user back-end: QEMU's order of messages, restarts, file descriptors, and peers that break the protocol."""

from __future__ import annotations

import array
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enclavekit.errors import ProtocolError
from enclavekit.testing.vhost_user import USER_BASE, MockFrontEnd
from enclavekit.testing.virtio import MockQueue
from enclavekit.virtio.queue import Virtqueue
from enclavekit.virtio.vhost_user import VhostUser
from enclavekit.virtio.vhost_user_message import (
    CONFIG_HEADER,
    HEADER,
    MAX_PAYLOAD,
    MEMORY_REGION,
    MEMORY_TABLE,
    NEED_REPLY,
    PROTOCOL_FEATURES,
    U64,
    VERSION,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VRING_ADDRESS,
    VRING_NO_FD,
    VRING_STATE,
    Request,
)

FEATURES = 1 << 32
MEMORY = 0x20000


class FakeDevice:
    """Remembers its queues."""

    features = FEATURES
    queue_count = 2
    queue_names = ("rx", "tx")
    config = bytes(range(8))

    def __init__(self) -> None:
        self.running: dict[int, Virtqueue] = {}
        self.stops: list[int] = []

    def start(self, index: int, queue: Virtqueue) -> None:
        assert index not in self.running
        self.running[index] = queue

    def stop(self, index: int) -> None:
        del self.running[index]
        self.stops.append(index)


class FakeLoop:
    """Remembers what is watched."""

    def __init__(self) -> None:
        self.watched: set[int] = set()
        self.retired: list[socket.socket] = []
        self.refuse = False

    def watch(self, fd: int, callback: Callable[[int], None] | None) -> None:
        if self.refuse:
            raise PermissionError(1, "operation not permitted")
        if callback is not None:
            callback(0)
        self.watched.add(fd)

    def forget(self, fd: int) -> None:
        self.watched.remove(fd)

    def retire(self, sock: socket.socket) -> None:
        self.retired.append(sock)
        sock.close()


class Rig:
    """A back-end, and a front-end whose messages it has answered when a call returns."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.settimeout(10)
        self.device, self.loop = FakeDevice(), FakeLoop()
        self.back = VhostUser(ours, self.device, self.loop)
        self.front = MockFrontEnd(theirs, MEMORY)
        self.queues = [
            MockQueue("rx", self.front.memory, 0, size=8, slot=64),
            MockQueue("tx", self.front.memory, 0x10000, size=16, slot=64),
        ]

    def say(self, request: int, payload: bytes = b"", fds: list[int] | None = None, *, flags: int = VERSION) -> None:
        self.front.send(request, payload, fds or [], flags=flags)
        self.back.on_readable()

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        self.say(request, payload)
        answered, flags, reply = self.front.reply()
        assert (answered, flags) == (request, 0x5)
        return reply

    def during(self, conversation: Callable[[], object]) -> None:
        """Answer in this thread while the front-end blocks in another."""
        thread = threading.Thread(target=conversation)
        thread.start()
        while thread.is_alive():
            self.back.on_readable()
        thread.join()
        self.back.on_readable()

    def start(self, base: int = 0) -> None:
        def boot() -> None:
            self.front.handshake()
            self.front.start(self.queues, base)

        self.during(boot)

    def close(self) -> None:
        self.back.close()
        self.front.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def open_fds() -> int:
    gc.collect()  # a mapping holds a file descriptor of its own
    return len(list(Path("/proc/self/fd").iterdir()))


def refused(rig: Rig, request: int, payload: bytes = b"", fds: list[int] | None = None, *, flags: int = VERSION) -> str:
    with pytest.raises(ProtocolError) as caught:
        rig.say(request, payload, fds, flags=flags)
    return str(caught.value)


def test_layouts() -> None:
    assert (HEADER.size, VRING_STATE.size, VRING_ADDRESS.size) == (12, 8, 40)
    assert (MEMORY_TABLE.size, MEMORY_REGION.size, CONFIG_HEADER.size) == (8, 32, 12)
    assert MAX_PAYLOAD == 264


def test_what_is_offered(rig: Rig) -> None:
    assert U64.unpack(rig.ask(Request.GET_FEATURES)) == (FEATURES | 1 << 30,)
    assert U64.unpack(rig.ask(Request.GET_PROTOCOL_FEATURES)) == (1 << 0 | 1 << 3 | 1 << 9,)
    assert U64.unpack(rig.ask(Request.GET_QUEUE_NUM)) == (2,)


def test_configuration_space(rig: Rig) -> None:
    assert (
        rig.ask(Request.GET_CONFIG, CONFIG_HEADER.pack(2, 3, 0) + bytes(3)) == CONFIG_HEADER.pack(2, 3, 0) + b"\2\3\4"
    )


@pytest.mark.parametrize(("offset", "size", "room"), [(0, 9, 9), (8, 1, 1), (0, 8, 7), (0xFFFFFFFF, 1, 1), (0, 0, 252)])
def test_configuration_that_is_not_there_is_an_empty_reply(rig: Rig, offset: int, size: int, room: int) -> None:
    assert rig.ask(Request.GET_CONFIG, CONFIG_HEADER.pack(offset, size, 0) + bytes(room)) == b""


def test_replies_only_where_asked_for_and_negotiated(rig: Rig) -> None:
    rig.say(Request.SET_OWNER, flags=VERSION | NEED_REPLY)
    rig.say(Request.SET_PROTOCOL_FEATURES, U64.pack(PROTOCOL_FEATURES))
    rig.say(Request.SET_OWNER, flags=VERSION | NEED_REPLY)
    assert rig.front.reply() == (Request.SET_OWNER, 0x5, U64.pack(0))
    rig.ask(Request.GET_FEATURES)  # and nothing else was said


def test_messages_come_in_pieces(rig: Rig) -> None:
    message = HEADER.pack(Request.SET_PROTOCOL_FEATURES, VERSION | NEED_REPLY, 8) + U64.pack(PROTOCOL_FEATURES)
    for byte in message:
        rig.front.transport.send(bytes([byte]))
        rig.back.on_readable()
    assert rig.front.reply() == (Request.SET_PROTOCOL_FEATURES, 0x5, U64.pack(0))


def test_a_guest_starts_its_driver(rig: Rig) -> None:
    rig.start()
    assert sorted(rig.device.running) == [0, 1]
    assert len(rig.loop.watched) == 2
    head = rig.queues[1].add(readable=[b"hello"])
    chain = rig.device.running[1].pop()
    assert chain is not None
    assert [bytes(part) for part in chain.readable] == [b"hello"]
    rig.device.running[1].push(chain.head, 0)
    rig.device.running[1].signal()
    assert rig.queues[1].take_used() == [(head, b"")]
    rig.front.wait(1)


def test_a_guest_boots_again_on_the_same_connection(rig: Rig) -> None:
    for _ in range(3):
        rig.start()
        rig.queues[1].add(readable=[b"x"])
        rig.device.running[1].pop()
        bases: list[int] = []
        rig.during(lambda bases=bases: bases.extend(rig.front.stop(2)))  # type: ignore[misc]
        assert bases == [0, 1]
        assert rig.device.running == {}
        assert rig.loop.watched == set()
        for queue in rig.queues:
            queue.reset()


def test_a_queue_goes_on_from_its_base(rig: Rig) -> None:
    for queue in rig.queues:
        queue.add(readable=[b"done before"])
        queue.add(readable=[b"new"])
    rig.start(base=1)
    chain = rig.device.running[0].pop()
    assert chain is not None
    assert [bytes(part) for part in chain.readable] == [b"new"]
    assert rig.device.running[0].base == 2


def test_a_new_call_eventfd_is_signalled_once(rig: Rig) -> None:
    rig.start()
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    rig.say(Request.SET_VRING_CALL, U64.pack(0), [fd])
    assert os.eventfd_read(fd) == 1
    rig.device.running[0].push(0, 0)
    rig.device.running[0].signal()
    assert os.eventfd_read(fd) == 1
    os.close(fd)


def test_a_call_eventfd_that_is_full_is_no_harm(rig: Rig) -> None:
    rig.start()
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    os.eventfd_write(fd, 0xFFFFFFFFFFFFFFFE)
    rig.say(Request.SET_VRING_CALL, U64.pack(0), [fd])
    os.close(fd)


def test_a_driver_that_polls_is_not_signalled(rig: Rig) -> None:
    rig.start()
    rig.say(Request.SET_VRING_CALL, U64.pack(0 | VRING_NO_FD))
    rig.device.running[0].push(0, 0)
    rig.device.running[0].signal()


def test_enabling_twice_disturbs_nothing(rig: Rig) -> None:
    rig.start()
    rig.say(Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 1))
    assert rig.device.stops == []
    rig.say(Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 0))
    assert rig.device.stops == [0]


def test_memory_can_be_set_anew_while_the_rings_run(rig: Rig) -> None:
    rig.start()
    queue = rig.device.running[1]
    rig.queues[1].add(readable=[b"one"])
    queue.pop()
    rig.during(rig.front.set_memory)
    assert rig.device.running[1] is not queue
    assert rig.device.running[1].base == 1


def test_without_protocol_features_rings_need_no_enabling(rig: Rig) -> None:
    rig.say(Request.SET_FEATURES, U64.pack(FEATURES))
    rig.during(rig.front.handshake)
    rig.front.features &= ~VHOST_USER_F_PROTOCOL_FEATURES
    rig.during(lambda: rig.front.start(rig.queues))
    assert sorted(rig.device.running) == [0, 1]


def test_the_front_end_leaves(rig: Rig) -> None:
    rig.start()
    rig.front.transport.shutdown(socket.SHUT_WR)
    rig.back.on_readable()
    assert rig.back.ended


def test_the_front_end_leaves_within_a_message(rig: Rig) -> None:
    rig.front.transport.send(HEADER.pack(Request.SET_FEATURES, VERSION, 8) + b"\0")
    rig.front.transport.shutdown(socket.SHUT_WR)
    rig.back.on_readable()
    assert rig.back.ended


def test_the_front_end_leaves_before_its_reply(rig: Rig) -> None:
    rig.front.send(Request.GET_FEATURES)
    rig.front.transport.close()
    rig.back.on_readable()
    assert rig.back.ended


def test_everything_is_closed() -> None:
    before = open_fds()
    rig = Rig()
    rig.start()
    rig.say(Request.SET_VRING_ERR, U64.pack(0), [rig.front.memory_fd])
    rig.say(Request.SET_OWNER, b"", [rig.front.memory_fd] * 3)  # nobody asked for them
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [rig.front.memory_fd] * 40))]
    rig.front.transport.sendmsg([HEADER.pack(Request.SET_OWNER, VERSION, 8)], ancillary)  # unfinished
    rig.back.on_readable()
    rig.close()
    assert rig.device.running == {}
    del rig
    assert open_fds() == before


# Peers that break the protocol


def test_wrong_flags(rig: Rig) -> None:
    expected = "vhost-user: request 1: flags 0x2, expected a request of version 1"
    assert refused(rig, Request.GET_FEATURES, flags=2) == expected


def test_a_reply_is_no_request(rig: Rig) -> None:
    expected = "vhost-user: request 1: flags 0x5, expected a request of version 1"
    assert refused(rig, Request.GET_FEATURES, flags=5) == expected


def test_a_message_too_long(rig: Rig) -> None:
    assert refused(rig, Request.SET_MEM_TABLE, bytes(265)) == "vhost-user: request 5: 265 bytes, the limit is 264"


def test_a_request_that_was_not_offered(rig: Rig) -> None:
    assert refused(rig, 37, bytes(40)) == "vhost-user: request 37 was not offered"


@pytest.mark.parametrize(
    ("request_", "size"),
    [
        (Request.SET_FEATURES, 8),
        (Request.SET_PROTOCOL_FEATURES, 8),
        (Request.SET_VRING_NUM, 8),
        (Request.SET_VRING_BASE, 8),
        (Request.SET_VRING_ENABLE, 8),
        (Request.GET_VRING_BASE, 8),
        (Request.SET_VRING_ADDR, 40),
        (Request.SET_VRING_KICK, 8),
        (Request.SET_VRING_CALL, 8),
        (Request.SET_VRING_ERR, 8),
    ],
)
def test_wrong_sizes(rig: Rig, request_: Request, size: int) -> None:
    expected = f"vhost-user: {request_.name}: {size - 1} bytes, expected {size}"
    assert refused(rig, request_, bytes(size - 1)) == expected


@pytest.mark.parametrize(("request_", "size"), [(Request.GET_CONFIG, 12), (Request.SET_MEM_TABLE, 8)])
def test_too_short_for_their_heads(rig: Rig, request_: Request, size: int) -> None:
    expected = f"vhost-user: {request_.name}: {size - 1} bytes, expected {size} and more"
    assert refused(rig, request_, bytes(size - 1)) == expected


def test_features_that_were_not_offered(rig: Rig) -> None:
    expected = "vhost-user: SET_FEATURES: 0x400000000 has bits that 0x140000000 did not offer"
    assert refused(rig, Request.SET_FEATURES, U64.pack(1 << 34)) == expected


@pytest.mark.parametrize(
    "request_",
    [Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE, Request.GET_VRING_BASE],
)
def test_a_queue_that_the_device_lacks(rig: Rig, request_: Request) -> None:
    expected = f"vhost-user: {request_.name}: queue 2, the device has 2"
    assert refused(rig, request_, VRING_STATE.pack(2, 1)) == expected


def test_an_eventfd_for_a_queue_that_the_device_lacks(rig: Rig) -> None:
    message = refused(rig, Request.SET_VRING_KICK, U64.pack(255), [rig.front.memory_fd])
    assert message == "vhost-user: SET_VRING_KICK: queue 255, the device has 2"


@pytest.mark.parametrize("size", [0, 3, 65536])
def test_impossible_queue_sizes(rig: Rig, size: int) -> None:
    expected = f"vhost-user: SET_VRING_NUM: size {size} is not a power of two up to 32768"
    assert refused(rig, Request.SET_VRING_NUM, VRING_STATE.pack(0, size)) == expected


@pytest.mark.parametrize(
    ("value", "count", "expected"), [(0, 0, 1), (0, 2, 1), (VRING_NO_FD, 1, 0), (VRING_NO_FD | 1, 3, 0)]
)
def test_a_wrong_number_of_file_descriptors(rig: Rig, value: int, count: int, expected: int) -> None:
    message = refused(rig, Request.SET_VRING_CALL, U64.pack(value), [rig.front.memory_fd] * count)
    assert message == f"vhost-user: SET_VRING_CALL: {count} file descriptors, expected {expected}"


def test_rings_are_not_polled(rig: Rig) -> None:
    message = refused(rig, Request.SET_VRING_KICK, U64.pack(VRING_NO_FD))
    assert message == "vhost-user: SET_VRING_KICK: 0 file descriptors, expected 1"


@pytest.mark.parametrize(("count", "regions", "fds"), [(2, 1, 2), (1, 1, 0), (1, 1, 2), (9, 8, 9)])
def test_a_memory_table_that_does_not_fit(rig: Rig, count: int, regions: int, fds: int) -> None:
    payload = MEMORY_TABLE.pack(count, 0) + MEMORY_REGION.pack(0, MEMORY, 0, 0) * regions
    message = refused(rig, Request.SET_MEM_TABLE, payload, [rig.front.memory_fd] * fds)
    assert message == (
        f"vhost-user: SET_MEM_TABLE: {count} regions in {len(payload)} bytes with {fds} file descriptors"
    )


def test_a_ring_outside_of_memory(rig: Rig) -> None:
    rig.start()
    user = USER_BASE + MEMORY - 16
    message = refused(rig, Request.SET_VRING_ADDR, VRING_ADDRESS.pack(0, 0, user, USER_BASE, USER_BASE, 0))
    assert message == f"vhost-user: 0x80 bytes of ring at {user:#018x} are not in guest memory"


def test_a_kick_that_cannot_be_waited_for(rig: Rig) -> None:
    rig.start()
    rig.loop.refuse = True
    message = refused(rig, Request.SET_VRING_KICK, U64.pack(0), [rig.front.memory_fd])
    assert message == "vhost-user: cannot wait for the driver: [Errno 1] operation not permitted"


def test_a_call_that_cannot_be_signalled(rig: Rig) -> None:
    rig.start()
    read_end, write_end = os.pipe()
    os.close(write_end)
    message = refused(rig, Request.SET_VRING_CALL, U64.pack(0), [read_end])
    os.close(read_end)
    assert message == "vhost-user: cannot signal the driver: [Errno 9] Bad file descriptor"


def test_a_front_end_that_does_not_read(rig: Rig) -> None:
    def flood() -> None:
        for _ in range(100_000):
            rig.say(Request.GET_FEATURES)

    with pytest.raises(ProtocolError, match=r"^vhost-user: the front-end does not read its replies$"):
        flood()


INTEGERS = st.one_of(st.integers(0, 20), st.sampled_from([USER_BASE, MEMORY, 1 << 31, (1 << 64) - 1]))
PAYLOADS = st.one_of(
    st.binary(max_size=80),
    st.builds(U64.pack, INTEGERS),
    st.builds(VRING_STATE.pack, st.integers(0, 3), st.integers(0, 64)),
    st.builds(
        lambda index, *user: VRING_ADDRESS.pack(index, 0, *user, 0), st.integers(0, 2), INTEGERS, INTEGERS, INTEGERS
    ),
    st.builds(
        lambda *region: MEMORY_TABLE.pack(1, 0) + MEMORY_REGION.pack(*region), INTEGERS, INTEGERS, INTEGERS, INTEGERS
    ),
)
MESSAGES = st.tuples(
    st.one_of(st.sampled_from(Request), st.integers(0, 50)),
    PAYLOADS,
    st.integers(0, 3),
    st.sampled_from([VERSION, VERSION | NEED_REPLY]),
)


@settings(deadline=None, max_examples=20)
@given(started=st.booleans(), messages=st.lists(MESSAGES, max_size=20))
def test_any_conversation_ends_in_order_or_in_our_error(
    started: bool, messages: list[tuple[int, bytes, int, int]]
) -> None:
    before = open_fds()
    rig = Rig()
    try:
        if started:
            rig.start()
        for request, payload, fds, flags in messages:
            rig.say(request, payload, [rig.front.memory_fd] * fds, flags=flags)
    except ProtocolError:
        pass
    rig.close()
    del rig
    assert open_fds() == before
