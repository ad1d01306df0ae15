# SPDX-License-Identifier: Apache-2.0
"""Any driver: the device goes on or is marked broken; it raises nothing, never hangs, and stays within its bounds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from vsock_rig import CID, HOST_PORT, UNDECIDED_PORT, Rig

from enclavekit.virtio.queue import VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE
from enclavekit.virtio.vsock import FIRST_HOST_PORT, MAX_REPLIES
from enclavekit.virtio.vsock_connection import BUF_ALLOC
from enclavekit.virtio.vsock_host import Outcome
from enclavekit.virtio.vsock_packet import HEADER, Op

PORTS = st.sampled_from([1, 2, 7000, HOST_PORT, UNDECIDED_PORT, FIRST_HOST_PORT])
COUNTERS = st.one_of(st.integers(0, 5000), st.sampled_from([0xFFFFFFFF, 1 << 31, 1 << 30]))
PACKETS = st.builds(
    lambda op, source, destination, size, **fields: ("packet", (op, source, destination, bytes(size)), fields),
    st.one_of(st.sampled_from(Op), st.integers(0, 0xFFFF)),
    PORTS,
    PORTS,
    st.sampled_from([0, 1, 500, 4000]),
    cid=st.sampled_from([2, 3, 3, 3, 16, 99, (1 << 64) - 1]),
    flags=st.integers(0, 0xFFFFFFFF),
    buf_alloc=COUNTERS,
    fwd_cnt=COUNTERS,
    type=st.sampled_from([1, 1, 1, 1, 2, 0xFFFF]),
)
HOST = st.sampled_from(
    ["open", "accept", "refuse", "give", "finish", "hang up", "room", "no room", "timers", "receive", "restart"]
)
STEPS = st.one_of(PACKETS, HOST.map(lambda name: (name, (), {})))

DESCRIPTORS = st.tuples(
    st.one_of(st.integers(0, 0x4000), st.integers(0, (1 << 64) - 1)),
    st.one_of(st.sampled_from([HEADER.size, HEADER.size + 1, 4096]), st.integers(0, 0xFFFFFFFF)),
    st.sampled_from(
        [0, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE, VIRTQ_DESC_F_INDIRECT]
    ),
    st.integers(0, 9),
)


def check_bounds(rig: Rig) -> None:
    """Of memory, and of what is kept for whom."""
    device = rig.device
    links = [*device._links.values(), *device._draining]
    assert all(len(link.outgoing) <= BUF_ALLOC for link in links)
    assert len(device._replies) <= MAX_REPLIES
    assert len(set(map(id, device._ready))) == len(device._ready) <= len(links) + device_closed(rig)
    assert sum(not stream.closed for stream in rig.route.streams) <= len(links)


def device_closed(rig: Rig) -> int:
    """Connections that ended while they waited for their turn leave it when it comes."""
    return sum(rig.device._links.get(link.key) is not link for link in rig.device._ready)


def step(rig: Rig, name: str, packet: tuple[int, int, int, bytes], fields: dict[str, int]) -> None:
    live = [stream for stream in rig.route.streams if not stream.closed and stream.on_event]
    match name:
        case "packet":
            op, source, destination, payload = packet
            rig.guest.send(op, source, destination, payload, **fields)
        case "open":
            rig.open()
        case "accept" | "refuse":
            pending, rig.route.pending[:] = list(rig.route.pending), []
            for one in pending:
                one.answer(name == "accept")
        case "timers":
            timers, rig.timers[:] = list(rig.timers), []
            for timer in timers:
                if not timer.cancelled:
                    timer.call()
        case "receive":
            rig.guest.receive()
        case "restart":
            rig.device.stop(0)
            rig.device.stop(1)
            rig.guest.rx.reset()
            rig.guest.tx.reset()
            rig.start()
            rig.guest.fill_rx()
        case "room" | "no room":
            for stream in live:
                stream.make_room(1 << 20 if name == "room" else 0)
        case "give":
            for stream in live:
                stream.give(bytes(10_000))
        case "finish":
            for stream in live:
                stream.finish()
        case _:
            for stream in live:
                stream.hang_up()
    rig.work()


@settings(deadline=None)
@given(st.lists(STEPS, max_size=60))
def test_any_packets_and_any_host(steps: list[tuple[str, tuple[int, int, int, bytes], dict[str, int]]]) -> None:
    rig = Rig(size=16)
    for name, packet, fields in steps:
        step(rig, name, packet, fields)
        assert rig.device.error is None
        check_bounds(rig)
    rig.device.close()
    assert all(stream.closed for stream in rig.route.streams)
    rig.work()
    opened = [outcome for outcome, _ in rig.outcomes]
    assert len(opened) == sum(name == "open" for name, _, _ in steps)
    assert set(opened) <= set(Outcome)


@settings(deadline=None)
@given(
    tables=st.tuples(st.lists(DESCRIPTORS, max_size=8), st.lists(DESCRIPTORS, max_size=8)),
    heads=st.tuples(st.lists(st.integers(0, 9), max_size=8), st.lists(st.integers(0, 9), max_size=8)),
    jump=st.integers(0, 0xFFFF),
    memory=st.binary(min_size=64, max_size=200),
)
def test_any_rings(
    tables: tuple[list[tuple[int, int, int, int]], ...], heads: tuple[list[int], ...], jump: int, memory: bytes
) -> None:
    rig = Rig(size=8)
    rig.connect()
    bystander = Rig(size=8)
    bystander.connect()
    rig.guest.rx.reset()
    rig.guest.tx.reset()
    rig.start()
    header = HEADER.pack(CID, 3, 1024, HOST_PORT, 4, 1, Op.RW, 0, 1 << 20, 0)
    for queue, table, offered in zip((rig.guest.rx, rig.guest.tx), tables, heads, strict=True):
        for index, (address, length, flags, following) in enumerate(table):
            queue.describe(index, address, length, flags, following)
            queue._memory[queue.buffer_gpa(index) :][: len(header) + len(memory)] = header + memory
        for head in offered:
            queue.offer(head)
    if jump % 3 == 0:
        rig.guest.tx.announce(jump)
    rig.open()
    rig.work()
    check_bounds(rig)
    if rig.device.error is not None:
        assert rig.device.process() is False
        assert all(stream.closed for stream in rig.route.streams)
    bystander.send(Op.CREDIT_REQUEST)
    assert bystander.receive_ops() == [Op.CREDIT_UPDATE]
