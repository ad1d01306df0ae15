# SPDX-License-Identifier: Apache-2.0
"""The vsock device: routes, data, credit, closing, answers, fairness; then drivers that break the rules."""

from __future__ import annotations

import gc
import os
import select
import sys
from collections import Counter
from collections.abc import Callable

import pytest
from vsock_rig import CID, GUEST_PORT, HOST_PORT, UNDECIDED_PORT, FakeStream, Rig

from enclavekit.errors import ProtocolError
from enclavekit.testing.virtio import PacketLayout
from enclavekit.virtio import vsock
from enclavekit.virtio.vsock import (
    BULK,
    FIRST_HOST_PORT,
    KEEP_S,
    MAX_PARTS,
    MAX_TURN,
    RX,
    SPARE_READY,
    TX,
    split,
)
from enclavekit.virtio.vsock_connection import BUF_ALLOC
from enclavekit.virtio.vsock_host import Outcome
from enclavekit.virtio.vsock_packet import (
    HEADER,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    Address,
    Header,
    Op,
)

UPDATE_AFTER = BUF_ALLOC * 3 // 4


def test_configuration_is_the_guests_cid() -> None:
    assert Rig().device.config == (16).to_bytes(8, "little")


@pytest.mark.parametrize("cid", [2, 3])
def test_both_names_of_the_parent_are_dialled_alike(cid: int) -> None:
    rig = Rig()
    rig.send(Op.REQUEST, cid=cid)
    ((header, payload),) = rig.receive()
    assert header == Header(cid, CID, HOST_PORT, GUEST_PORT, 0, 1, Op.RESPONSE, 0, BUF_ALLOC, 0)
    assert payload == b""
    assert rig.route.calls == [(Address(CID, GUEST_PORT), HOST_PORT)]


def test_a_refused_port_and_an_unknown_cid_are_reset_at_once() -> None:
    rig = Rig()
    rig.send(Op.REQUEST, destination=1)
    rig.send(Op.REQUEST, cid=77)
    assert [header for header, _ in rig.receive()] == [
        Header(3, CID, 1, GUEST_PORT, 0, 1, Op.RST, 0, 0, 0),
        Header(77, CID, HOST_PORT, GUEST_PORT, 0, 1, Op.RST, 0, 0, 0),
    ]


def test_who_is_asked_may_answer_later() -> None:
    rig = Rig()
    rig.send(Op.REQUEST, destination=UNDECIDED_PORT)
    assert rig.receive_ops() == []
    assert rig.route.streams[0].on_event is None  # nothing is read before
    rig.route.pending[0].answer(True)
    assert rig.receive_ops() == [Op.RESPONSE]
    rig.send(Op.RW, b"hello", destination=UNDECIDED_PORT)
    assert rig.route.streams[0].sent == b"hello"


def test_who_is_asked_may_refuse_later() -> None:
    rig = Rig()
    rig.send(Op.REQUEST, destination=UNDECIDED_PORT)
    rig.route.pending[0].answer(False)
    assert rig.receive_ops() == [Op.RST]
    assert rig.route.streams[0].closed
    assert rig.device.connections == 0


@pytest.mark.parametrize("op", [op for op in Op if op != Op.RST])
def test_a_guest_that_does_not_wait_for_the_answer_is_reset(op: int) -> None:
    rig = Rig()
    rig.send(Op.REQUEST, destination=UNDECIDED_PORT)
    rig.send(op, destination=UNDECIDED_PORT)
    assert rig.receive_ops() == [Op.RST]
    assert rig.route.streams[0].closed
    rig.route.pending[0].answer(True)
    assert rig.receive_ops() == []


def test_a_guest_that_gave_up_and_asks_again_gets_its_own_answer() -> None:
    rig = Rig()
    rig.send(Op.REQUEST, destination=UNDECIDED_PORT)
    rig.send(Op.RST, destination=UNDECIDED_PORT)
    rig.send(Op.REQUEST, destination=UNDECIDED_PORT)
    rig.route.pending[0].answer(True)
    assert rig.receive_ops() == []
    rig.route.pending[1].answer(False)
    assert rig.receive_ops() == [Op.RST]


def test_the_host_may_come_from_an_address_that_it_names_but_only_once_at_a_time() -> None:
    rig = Rig()
    source = Address(3, 4711)
    for _ in range(2):
        rig.device.open(7000, FakeStream(), 2.0, lambda outcome, port: rig.outcomes.append((outcome, port)), source)
    ((header, _),) = rig.receive()
    assert (header.src_cid, header.src_port, header.dst_port) == (3, 4711, 7000)
    assert rig.outcomes == [(Outcome.REFUSED, 0)]
    rig.send(Op.RESPONSE, source=7000, destination=4711)
    assert rig.outcomes[1:] == [(Outcome.ACCEPTED, 4711)]


@pytest.mark.parametrize("op", [op for op in Op if op not in (Op.REQUEST, Op.RST)] + [0, 99])
def test_strangers_are_reset(op: int) -> None:
    rig = Rig()
    rig.send(op, b"x" if op == Op.RW else b"")
    assert rig.receive_ops() == [Op.RST]


def test_an_rst_is_never_answered() -> None:
    rig = Rig()
    rig.send(Op.RST)
    rig.send(Op.RST, type=2)
    assert rig.receive_ops() == []


def test_other_types_are_reset() -> None:
    rig = Rig()
    rig.send(Op.REQUEST, type=2)
    ((header, _),) = rig.receive()
    assert (header.op, header.type) == (Op.RST, 2)
    assert rig.route.calls == []


def test_packets_from_another_cid_are_thrown_away() -> None:
    rig = Rig()
    rig.guest.cid = 17
    rig.send(Op.REQUEST)
    assert rig.receive() == []
    assert rig.route.calls == []


@pytest.mark.parametrize("layout", PacketLayout)
def test_data_goes_both_ways_in_any_layout(layout: PacketLayout) -> None:
    rig = Rig(layout=layout)
    stream = rig.connect()
    rig.send(Op.RW, b"to the host")
    rig.send(Op.RW, bytes(range(256)))
    assert stream.sent == b"to the host" + bytes(range(256))
    stream.give(b"to the guest")
    ((header, payload),) = rig.receive()
    assert payload == b"to the guest"
    assert header == Header(3, CID, HOST_PORT, GUEST_PORT, 12, 1, Op.RW, 0, BUF_ALLOC, 11 + 256)


@pytest.mark.parametrize("layout", PacketLayout)
def test_much_data_is_split_to_the_rx_buffers(layout: PacketLayout) -> None:
    rig = Rig(layout=layout, slot=300)
    stream = rig.connect()
    data = os.urandom(20_000)
    stream.give(data)
    packets: list[tuple[Header, bytes]] = []
    while got := rig.receive():
        packets += got
    assert b"".join(payload for _, payload in packets) == data
    assert all(header.len == len(payload) for header, payload in packets)
    assert max(len(payload) for _, payload in packets) == 300 - HEADER.size


def test_a_payload_shorter_than_its_descriptors() -> None:
    rig = Rig()
    stream = rig.connect()
    rig.guest.send_raw(bytes(Header(CID, 3, GUEST_PORT, HOST_PORT, 3, 1, Op.RW, 0, 1000, 0)) + b"abcdef")
    rig.work()
    assert stream.sent == b"abc"


def test_a_payload_in_very_many_pieces() -> None:
    rig = Rig(size=128)
    stream = rig.connect()
    header = bytes(Header(CID, 3, GUEST_PORT, HOST_PORT, 100, 1, Op.RW, 0, 1000, 0))
    rig.guest.tx.take_used()
    rig.guest.tx.add(readable=[header, *[bytes([number]) for number in range(100)]])
    rig.work()
    assert stream.sent == bytes(range(100))


def test_rx_chains_in_very_many_pieces_are_used_as_far_as_they_go() -> None:
    rig = Rig(size=256)
    stream = rig.connect()
    rig.guest.receive(refill=False)
    rig.guest.rx.reset()
    rig.device.start(RX, rig.guest.rx.for_device(rig.guest.memory))
    rig.guest.rx.add(writable=[20, 24, *[1] * 200])
    stream.give(bytes(range(100)))
    rig.work()
    ((_, packet),) = rig.guest.rx.take_used()
    assert Header.parse(packet).len == MAX_PARTS
    assert packet[HEADER.size :] == bytes(range(MAX_PARTS))


def test_the_guests_credit_is_kept() -> None:
    rig = Rig()
    stream = rig.connect(buf_alloc=100)
    stream.give(b"x" * 250)
    assert [len(payload) for _, payload in rig.receive()] == [100]
    rig.send(Op.CREDIT_UPDATE, buf_alloc=100, fwd_cnt=60)
    assert [len(payload) for _, payload in rig.receive()] == [60]
    rig.send(Op.RW, b"credit comes with data too", buf_alloc=1000, fwd_cnt=160)
    assert [len(payload) for _, payload in rig.receive()] == [90]


def test_a_host_that_does_not_read_costs_the_credit_that_we_gave_and_not_more() -> None:
    rig = Rig(slot=70_000)
    stream = rig.connect()
    stream.room = 1000
    data = os.urandom(BUF_ALLOC + 1000)
    for start in range(0, len(data), 60_000):
        rig.send(Op.RW, data[start : start + 60_000])
    assert stream.sent == data[:1000]
    assert rig.receive_ops() == []
    stream.make_room(UPDATE_AFTER)
    assert [(header.op, header.fwd_cnt) for header, _ in rig.receive()] == [(Op.CREDIT_UPDATE, UPDATE_AFTER + 1000)]
    stream.make_room(1 << 30)
    assert stream.sent == data
    data += bytes(2 * UPDATE_AFTER - len(data) + 1000)
    for start in range(BUF_ALLOC + 1000, len(data), 60_000):
        rig.send(Op.RW, data[start : start + 60_000])
    assert stream.sent == data
    assert [header.fwd_cnt for header, _ in rig.receive()] == [len(data)]


def test_more_than_the_credit_is_a_reset() -> None:
    rig = Rig(slot=70_000)
    stream = rig.connect()
    stream.room = 0
    for _ in range(4):
        rig.send(Op.RW, bytes(65536))
    rig.send(Op.RW, b"x")
    assert rig.receive_ops() == [Op.RST]
    assert stream.closed
    rig.send(Op.RW, b"x")
    assert rig.receive_ops() == [Op.RST]


def test_asked_for_credit_it_tells() -> None:
    rig = Rig()
    rig.connect()
    rig.send(Op.CREDIT_REQUEST)
    assert rig.receive_ops() == [Op.CREDIT_UPDATE]


# Giving tx buffers back


def test_small_packets_are_given_back_at_once() -> None:
    rig = Rig()
    rig.connect()
    before = rig.guest.tx.used_index, rig.guest.tx.interrupts
    rig.send(Op.RW, b"x")
    assert (rig.guest.tx.used_index, rig.guest.tx.interrupts) == (before[0] + 1, before[1] + 1)


def test_much_data_is_given_back_together_and_soon() -> None:
    rig = Rig(slot=2 * BULK)
    stream = rig.connect()
    before, interrupts = rig.guest.tx.used_index, rig.guest.tx.interrupts
    for count in range(1, 8):
        rig.send(Op.RW, bytes(BULK))
        assert len(stream.sent) == count * BULK
        assert rig.guest.tx.used_index == before
    (timer,) = rig.timers
    assert timer.delay_s == KEEP_S
    timer.call()
    assert (rig.guest.tx.used_index, rig.guest.tx.interrupts) == (before + 7, interrupts + 1)
    for _ in range(8):
        rig.send(Op.RW, bytes(BULK))
    assert (rig.guest.tx.used_index, rig.guest.tx.interrupts) == (before + 15, interrupts + 2)
    assert rig.timers[-1].cancelled


def test_what_was_kept_goes_back_with_a_small_packet() -> None:
    rig = Rig(slot=2 * BULK)
    rig.connect()
    before = rig.guest.tx.used_index
    rig.send(Op.RW, bytes(BULK))
    rig.send(Op.RW, b"x")
    assert rig.guest.tx.used_index == before + 2


def test_what_was_kept_goes_back_when_packets_become_shorter() -> None:
    rig = Rig(slot=4 * BULK)
    rig.connect()
    before, interrupts = rig.guest.tx.used_index, rig.guest.tx.interrupts
    for size in (2 * BULK, 2 * BULK, 2 * BULK - 1):
        assert rig.guest.tx.used_index == before
        rig.send(Op.RW, bytes(size))
    assert (rig.guest.tx.used_index, rig.guest.tx.interrupts) == (before + 3, interrupts + 1)


def test_what_was_kept_goes_back_with_new_credit() -> None:
    rig = Rig(slot=UPDATE_AFTER // 2)
    rig.connect()
    before, interrupts = rig.guest.tx.used_index, rig.guest.tx.interrupts
    for _ in range(4):
        assert rig.guest.tx.used_index == before
        rig.send(Op.RW, bytes(UPDATE_AFTER // 4))
    assert rig.receive_ops() == [Op.CREDIT_UPDATE]
    assert (rig.guest.tx.used_index, rig.guest.tx.interrupts) == (before + 4, interrupts + 1)


def test_what_was_kept_goes_back_with_data_for_the_guest() -> None:
    rig = Rig(slot=2 * BULK)
    stream = rig.connect()
    before = rig.guest.tx.used_index
    rig.send(Op.RW, bytes(BULK))
    assert rig.guest.tx.used_index == before
    stream.give(b"x")
    rig.work()
    assert rig.guest.tx.used_index == before + 1


def test_a_queue_that_stops_keeps_nothing() -> None:
    rig = Rig(slot=2 * BULK)
    rig.connect()
    before = rig.guest.tx.used_index
    rig.send(Op.RW, bytes(BULK))
    rig.device.stop(TX)
    assert rig.guest.tx.used_index == before + 1
    rig.timers[-1].call()  # too late does no harm
    assert rig.guest.tx.used_index == before + 1


def test_what_cannot_be_signalled_is_given_back_once() -> None:
    rig = Rig()
    queue = rig.guest.tx.for_device(rig.guest.memory)
    rig.device.start(TX, queue)

    def broken() -> None:
        raise ProtocolError("no word reaches the driver")

    queue._interrupt = broken
    before = rig.guest.tx.used_index
    rig.guest.send(Op.CREDIT_UPDATE, GUEST_PORT, HOST_PORT)
    with pytest.raises(ProtocolError, match="no word"):
        rig.device.process()
    rig.device.stop(TX)
    assert rig.guest.tx.used_index == before + 1


def test_a_guest_that_gives_no_rx_buffers_fills_no_memory() -> None:
    rig = Rig()
    while rig.device._rx is not None and rig.device._rx.pop() is not None:
        pass
    for _ in range(500):
        rig.send(Op.REQUEST)
        rig.send(Op.RST)
        assert len(rig.device._ready) <= SPARE_READY + 1
    assert rig.device.connections == 0
    assert all(stream.closed for stream in rig.route.streams)


# Closing


def test_when_the_host_ends_its_half_the_guest_may_still_answer() -> None:
    rig = Rig()
    stream = rig.connect()
    stream.give(b"question")
    stream.finish()
    packets = rig.receive()
    assert [(header.op, header.flags, payload) for header, payload in packets] == [
        (Op.RW, 0, b"question"),
        (Op.SHUTDOWN, SHUTDOWN_SEND, b""),
    ]
    rig.send(Op.RW, b"answer")
    assert stream.sent == b"answer"
    rig.send(Op.SHUTDOWN, flags=SHUTDOWN_BOTH)
    assert rig.receive_ops() == [Op.RST]
    assert stream.closed


def test_when_the_guest_ends_its_half_the_host_may_still_answer() -> None:
    rig = Rig()
    stream = rig.connect()
    rig.send(Op.RW, b"question")
    rig.send(Op.SHUTDOWN, flags=SHUTDOWN_SEND)
    assert stream.ended
    assert not stream.closed
    stream.give(b"answer")
    assert [payload for _, payload in rig.receive()] == [b"answer"]


def test_the_hosts_half_ends_only_after_the_last_byte() -> None:
    rig = Rig()
    stream = rig.connect()
    stream.room = 2
    rig.send(Op.RW, b"abcd")
    rig.send(Op.SHUTDOWN, flags=SHUTDOWN_SEND)
    assert not stream.ended
    stream.make_room(1)
    assert not stream.ended
    stream.make_room(10)
    assert stream.sent == b"abcd"
    assert stream.ended


def test_a_guest_that_reads_no_more() -> None:
    rig = Rig()
    stream = rig.connect()
    rig.send(Op.SHUTDOWN, flags=SHUTDOWN_RECEIVE)
    assert stream.refused
    stream.give(b"nobody wants this")
    assert rig.receive_ops() == []
    stream.hang_up()
    assert [(header.op, header.flags) for header, _ in rig.receive()] == [(Op.SHUTDOWN, SHUTDOWN_BOTH)]


@pytest.mark.parametrize(
    "end", [lambda rig: rig.send(Op.SHUTDOWN, flags=SHUTDOWN_BOTH), lambda rig: rig.device.reset()]
)
def test_what_the_guest_sent_before_it_closed_is_delivered_slowly(end: Callable[[Rig], None]) -> None:
    rig = Rig()
    stream = rig.connect()
    stream.room = 1
    rig.send(Op.RW, b"abc")
    end(rig)
    assert not stream.closed
    stream.make_room(1)
    assert not stream.closed
    stream.make_room(1)
    assert stream.sent == b"abc"
    assert stream.closed


def test_an_rst_after_the_guests_last_byte_loses_nothing_and_before_it_closes_at_once() -> None:
    rig = Rig()
    polite, rude = rig.connect(source=1), rig.connect(source=2)
    polite.room = rude.room = 0
    rig.send(Op.RW, b"abc", source=1)
    rig.send(Op.RW, b"abc", source=2)
    rig.send(Op.SHUTDOWN, source=1, flags=SHUTDOWN_SEND)
    rig.send(Op.RST, source=1)
    rig.send(Op.RST, source=2)
    assert rude.closed
    assert not polite.closed
    assert rig.receive_ops() == []
    polite.make_room(3)
    assert polite.closed


def test_close_waits_for_nobody() -> None:
    rig = Rig()
    stream = rig.connect()
    stream.room = 0
    rig.send(Op.RW, b"abc")
    rig.device.close()
    assert stream.closed


def test_a_host_that_closes_gets_two_seconds_of_patience() -> None:
    rig = Rig()
    stream = rig.connect()
    stream.give(b"last words")
    stream.hang_up()
    assert [(header.op, header.flags) for header, _ in rig.receive()] == [
        (Op.RW, 0),
        (Op.SHUTDOWN, SHUTDOWN_BOTH),
    ]
    rig.send(Op.RW, b"too late")
    (timer,) = rig.timers
    assert timer.delay_s == 2.0
    timer.call()
    assert rig.receive_ops() == [Op.RST]
    assert stream.closed


def test_a_guest_that_confirms_stops_the_timer() -> None:
    rig = Rig()
    stream = rig.connect()
    stream.hang_up()
    rig.receive()
    rig.send(Op.RST)
    assert rig.timers[0].cancelled
    assert stream.closed


def test_a_host_that_only_stops_reading() -> None:
    rig = Rig()
    stream = rig.connect()
    stream.gone = True
    rig.send(Op.RW, b"into the void")
    assert [(header.op, header.flags) for header, _ in rig.receive()] == [(Op.SHUTDOWN, SHUTDOWN_RECEIVE)]
    stream.give(b"still speaks")
    assert [payload for _, payload in rig.receive()] == [b"still speaks"]


def test_a_host_that_goes_while_data_waits_for_it() -> None:
    rig = Rig()
    stream = rig.connect()
    stream.room = 0
    rig.send(Op.RW, b"waits")
    stream.hang_up()
    assert [(header.op, header.flags) for header, _ in rig.receive()] == [
        (Op.SHUTDOWN, SHUTDOWN_RECEIVE),
        (Op.SHUTDOWN, SHUTDOWN_BOTH),
    ]


def test_a_hang_up_after_the_end_is_seen() -> None:
    rig = Rig()
    stream = rig.connect()
    stream.finish()
    rig.receive()
    stream.event(select.EPOLLHUP)
    assert [(header.op, header.flags) for header, _ in rig.receive()] == [(Op.SHUTDOWN, SHUTDOWN_BOTH)]


# From the host


def test_the_host_connects_from_cid_3_and_ports_of_its_own() -> None:
    rig = Rig()
    streams = [rig.open(), rig.open()]
    headers = [header for header, _ in rig.receive()]
    assert headers[0] == Header(3, CID, FIRST_HOST_PORT, 7000, 0, 1, Op.REQUEST, 0, BUF_ALLOC, 0)
    assert headers[1].src_port == FIRST_HOST_PORT + 1
    assert streams[0].on_event is None  # nothing is read before the guest accepts
    rig.send(Op.RESPONSE, source=7000, destination=FIRST_HOST_PORT)
    assert rig.outcomes == [(Outcome.ACCEPTED, FIRST_HOST_PORT)]
    assert rig.timers[0].cancelled
    streams[0].give(b"hello")
    assert [payload for _, payload in rig.receive()] == [b"hello"]


def test_the_guest_refuses() -> None:
    rig = Rig()
    stream = rig.open()
    rig.receive()
    rig.send(Op.RST, source=7000, destination=FIRST_HOST_PORT)
    assert rig.outcomes == [(Outcome.REFUSED, 0)]
    assert stream.closed
    assert rig.receive_ops() == []


def test_the_guest_stays_silent() -> None:
    rig = Rig()
    stream = rig.open()
    rig.receive()
    assert rig.timers[0].delay_s == 2.0
    rig.timers[0].call()
    assert rig.outcomes == [(Outcome.TIMED_OUT, 0)]
    assert stream.closed
    assert rig.receive_ops() == [Op.RST]
    rig.send(Op.RESPONSE, source=7000, destination=FIRST_HOST_PORT)
    assert rig.receive_ops() == [Op.RST]


def test_the_guest_answers_nonsense() -> None:
    rig = Rig()
    stream = rig.open()
    rig.receive()
    rig.send(Op.RW, b"x", source=7000, destination=FIRST_HOST_PORT)
    assert rig.outcomes == [(Outcome.REFUSED, 0)]
    assert stream.closed
    assert rig.receive_ops() == [Op.RST]


def test_a_request_waits_for_the_guests_driver() -> None:
    rig = Rig()
    rig.device.stop(RX)
    rig.device.stop(TX)
    rig.guest.rx.reset()
    rig.guest.tx.reset()
    rig.open()
    rig.work()
    rig.start()
    rig.guest.fill_rx()
    assert rig.receive_ops() == [Op.REQUEST]


def test_nothing_can_be_opened_once_the_guest_is_gone() -> None:
    rig = Rig()
    waiting = rig.open()
    rig.device.end()
    late = rig.open()
    assert rig.outcomes == [(Outcome.ENDED, 0), (Outcome.ENDED, 0)]
    assert waiting.closed
    assert late.closed


def test_host_ports_begin_anew_at_the_end_of_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "END_HOST_PORT", FIRST_HOST_PORT + 2)
    rig = Rig()
    for _ in range(2):
        rig.open(7000)
    rig.open(7001)
    ports = [header.src_port for header, _ in rig.receive()]
    assert ports == [FIRST_HOST_PORT, FIRST_HOST_PORT + 1, FIRST_HOST_PORT]


# Bounds and fairness


def test_too_many_connections_are_refused() -> None:
    rig = Rig()
    rig.device.max_connections = 2
    rig.connect(source=1)
    rig.connect(source=2)
    rig.send(Op.REQUEST, source=3)
    assert rig.receive_ops() == [Op.RST]
    stream = rig.open()
    assert rig.outcomes == [(Outcome.REFUSED, 0)]
    assert stream.closed


def test_tx_is_drained_while_rx_is_full_and_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "MAX_REPLIES", 10)
    rig = Rig()
    rig.guest.rx.reset()
    rig.device.start(RX, rig.guest.rx.for_device(rig.guest.memory))
    rig.send(Op.REQUEST)
    stream = rig.route.streams[-1]
    for port in range(20):
        rig.send(Op.RW, b"to nobody", source=port)
    rig.send(Op.RW, b"to somebody")
    assert stream.sent == b"to somebody"
    rig.guest.fill_rx()
    assert rig.receive_ops() == [Op.RST] * 10 + [Op.RESPONSE]


def test_a_connection_waits_while_there_is_no_rx_buffer() -> None:
    rig = Rig()
    stream = rig.connect()
    stream.give(b"x" * MAX_TURN)
    rig.work()
    got = b""
    while packets := rig.guest.receive():
        got += b"".join(payload for _, payload in packets)
        rig.work()
    assert got == b"x" * MAX_TURN


def test_connections_take_turns() -> None:
    rig = Rig(size=64)
    first, second = rig.connect(source=1), rig.connect(source=2)
    first.give(bytes(10 * MAX_TURN))
    second.give(b"me too")
    rig.work()
    packets = rig.guest.receive(refill=False)
    before = [header.dst_port for header, _ in packets].index(2)
    assert sum(len(payload) for _, payload in packets[:before]) <= MAX_TURN


def test_one_call_works_a_bounded_time() -> None:
    rig = Rig(size=256)
    for port in range(vsock.TX_BATCH + 1):
        rig.guest.tx.take_used()
        rig.guest.send(Op.RW, port, 1)
    assert rig.device.process() is True
    assert rig.guest.tx.used_index == vsock.TX_BATCH
    rig.work()
    assert rig.guest.tx.used_index == vsock.TX_BATCH + 1


def test_one_interrupt_for_many_packets() -> None:
    rig = Rig()
    stream = rig.connect()
    before = rig.guest.rx.interrupts
    stream.give(bytes(10_000))
    rig.work()
    assert rig.guest.rx.interrupts == before + 1
    assert len(rig.guest.receive()) == 3


def test_much_data_is_told_of_turn_by_turn() -> None:
    rig = Rig()
    stream = rig.connect()
    before = rig.guest.rx.interrupts
    stream.give(bytes(2 * MAX_TURN))
    rig.work()
    assert rig.guest.rx.interrupts >= before + 2


def test_a_turn_takes_more_buffers_where_much_comes() -> None:
    rig = Rig()
    stream = rig.connect()
    (link,) = rig.device._links.values()
    turns = [link.turn]
    for size in (100, 40_000, 100, 100, 100, 100):
        stream.give(bytes(size))
        rig.work()
        turns.append(link.turn)
        rig.guest.receive()
    assert turns[:2] == [1, 1]
    assert turns[2] > 4
    assert turns[-1] == 1


# Stop and start


def test_a_reset_guest_starts_with_nothing() -> None:
    rig = Rig()
    stream = rig.connect()
    rig.device.stop(RX)
    rig.device.stop(TX)
    assert stream.closed
    rig.guest.rx.reset()
    rig.guest.tx.reset()
    rig.start()
    rig.guest.fill_rx()
    rig.send(Op.RW, b"who was that")
    assert rig.receive_ops() == [Op.RST]
    rig.connect()


def test_the_last_packets_before_a_stop_are_delivered() -> None:
    rig = Rig()
    stream = rig.connect()
    rig.guest.send(Op.RW, GUEST_PORT, HOST_PORT, b"goodbye")
    rig.device.stop(RX)
    assert stream.sent == b"goodbye"


def test_a_stopped_rx_queue_gives_its_unused_buffers_back() -> None:
    rig = Rig(size=64)
    queue = rig.guest.rx.for_device(rig.guest.memory)
    rig.guest.rx.reset()
    rig.device.start(RX, queue)
    rig.guest.fill_rx()
    stream = rig.connect()
    stream.give(b"x")  # several buffers are taken for this, one is used
    rig.work()
    rig.device.stop(RX)
    assert queue.base == 2


# Drivers that break the rules


def raw(rig: Rig, packet: bytes) -> None:
    rig.guest.send_raw(packet)
    rig.work()


HEADER_OF_9 = bytes(Header(CID, 3, GUEST_PORT, HOST_PORT, 9, 1, Op.RW, 0, 0, 0))


def writable_tx(rig: Rig) -> None:
    rig.guest.tx.add(readable=[HEADER_OF_9], writable=[9])
    rig.work()


def bad_rx(rig: Rig, readable: list[bytes], writable: list[int]) -> None:
    rig.guest.rx.reset()
    rig.device.start(RX, rig.guest.rx.for_device(rig.guest.memory))
    rig.guest.rx.add(readable, writable)
    rig.send(Op.CREDIT_REQUEST)


def readable_rx(rig: Rig) -> None:
    bad_rx(rig, [b"x"], [100])


def short_rx(rig: Rig) -> None:
    bad_rx(rig, [], [HEADER.size])


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda rig: raw(rig, b"short"), "tx queue: packet of 5 bytes, a header has 44"),
        (lambda rig: raw(rig, HEADER_OF_9 + b"8 bytes."), "tx queue: packet says 9 bytes of payload, 8 follow"),
        (writable_tx, "tx queue: the chain from descriptor 1 is writable"),
        (readable_rx, "rx queue: the chain from descriptor 0 is readable"),
        (short_rx, "rx queue: chain of 44 bytes, a packet needs more than 44"),
    ],
)
def test_a_broken_queue_ends_the_device_until_it_is_started_again(attack: Callable[[Rig], None], message: str) -> None:
    rig = Rig()
    stream = rig.connect()
    attack(rig)
    assert str(rig.device.error) == message
    assert stream.closed
    refused = rig.open()
    assert rig.outcomes == [(Outcome.REFUSED, 0)]
    assert refused.closed
    used = rig.guest.tx.used_index
    rig.work()
    assert rig.guest.tx.used_index == used
    rig.device.stop(RX)
    rig.device.stop(TX)
    rig.guest.rx.reset()
    rig.guest.tx.reset()
    rig.start()
    rig.guest.fill_rx()
    assert rig.device.error is None
    rig.connect()


def test_a_queue_that_is_broken_at_the_stop() -> None:
    rig = Rig()
    rig.connect()
    rig.guest.send_raw(b"short")
    rig.device.stop(TX)
    assert str(rig.device.error) == "tx queue: packet of 5 bytes, a header has 44"


def test_a_second_request_on_a_connection_resets_it() -> None:
    rig = Rig()
    stream = rig.connect()
    rig.send(Op.REQUEST)
    assert rig.receive_ops() == [Op.RST]
    assert stream.closed


def test_split() -> None:
    parts = [memoryview(b"abc"), memoryview(b"de")]
    for size in range(7):
        before, after = split(parts, size)
        assert b"".join(before) == b"abcde"[:size]
        assert b"".join(after) == b"abcde"[size:]


def test_thousands_of_connections_take_turns() -> None:
    rig = Rig(size=256, slot=512)
    streams = [rig.connect(source) for source in range(2000, 5000)]
    assert rig.device.connections == 3000
    for stream in streams:
        stream.give(bytes(1000))
    counts: Counter[int] = Counter()
    while sum(counts.values()) < 3_000_000:
        for header, data in rig.receive():
            counts[header.dst_port] += len(data)
            assert max(counts.values()) - min(counts.get(port, 0) for port in (2000, 3500, 4999)) <= 1000
    assert set(counts.values()) == {1000}
    rig.device.close()
    assert rig.device.connections == 0


def test_memory_does_not_grow_with_connections_that_end() -> None:
    rig = Rig()

    def one(source: int) -> None:
        stream = rig.connect(source)
        rig.send(Op.RW, b"hello", source=source)
        assert bytes(stream.sent) == b"hello"
        rig.send(Op.SHUTDOWN, source=source, flags=3)
        assert rig.receive_ops() == [Op.RST]
        rig.route.streams.clear()
        rig.route.calls.clear()

    for source in range(2000, 2500):
        one(source)
    gc.collect()
    before = sys.getallocatedblocks()
    for source in range(3000, 13_000):
        one(source)
    gc.collect()
    assert sys.getallocatedblocks() - before < 1000
    assert rig.device.connections == 0
