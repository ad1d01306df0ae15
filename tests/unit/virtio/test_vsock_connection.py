# SPDX-License-Identifier: Apache-2.0
"""One connection's machine: transitions, credit, half-close."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.virtio.vsock_connection import (
    BUF_ALLOC,
    TRANSITIONS,
    Connection,
    Event,
    State,
)
from enclavekit.virtio.vsock_packet import SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, Address, Header, Op

LOCAL, PEER = Address(3, 5000), Address(16, 1024)


def packet(op: int, *, length: int = 0, flags: int = 0, buf_alloc: int = 1000, fwd_cnt: int = 0) -> Header:
    return Header(PEER.cid, LOCAL.cid, PEER.port, LOCAL.port, length, 1, op, flags, buf_alloc, fwd_cnt & 0xFFFFFFFF)


def says(
    op: int, *, length: int = 0, flags: int = 0, buf_alloc: int = 1000, fwd_cnt: int = 0
) -> tuple[int, int, int, int, int]:
    """What a connection takes of a packet."""
    return op, length, flags, buf_alloc, fwd_cnt & 0xFFFFFFFF


def requested(buf_alloc: int = 1000) -> Connection:
    return Connection(LOCAL, PEER, request=packet(Op.REQUEST, buf_alloc=buf_alloc))


def accepted(buf_alloc: int = 1000) -> Connection:
    connection = requested(buf_alloc)
    connection.accept()
    response = connection.speak()
    assert response == Header(3, 16, 5000, 1024, 0, 1, Op.RESPONSE, 0, BUF_ALLOC, 0)
    return connection


def test_our_request() -> None:
    connection = Connection(LOCAL, PEER)
    assert connection.speak() == Header(3, 16, 5000, 1024, 0, 1, Op.REQUEST, 0, BUF_ALLOC, 0)
    assert connection.speak() is None
    assert connection.credit == 0
    assert connection.receive(*says(Op.RESPONSE, buf_alloc=77)) is Event.ACCEPTED
    assert connection.state is State.ESTABLISHED
    assert connection.credit == 77


def test_until_our_side_has_decided_nothing_is_said_or_sent() -> None:
    connection = requested(buf_alloc=1000)
    assert not connection.wanted
    assert connection.credit == 0
    connection.accept()
    assert connection.state is State.ESTABLISHED
    assert connection.credit == 1000


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("op", [*Op, 0, 8, 0xFFFF])
def test_what_is_not_in_the_table_is_a_violation(state: State, op: int) -> None:
    made = {State.CONNECTING: lambda: Connection(LOCAL, PEER), State.REQUESTED: requested}
    connection = made.get(state, accepted)()
    known = {what: event for what, (_, event) in TRANSITIONS[state].items()}
    assert connection.receive(*says(op)) is known.get(op, Event.VIOLATION)


def test_credit_is_what_the_peer_can_buffer_less_what_is_under_way() -> None:
    connection = accepted(buf_alloc=1000)
    assert connection.header(Op.RW, 600).len == 600
    assert connection.credit == 400
    connection.header(Op.RW, 400)
    assert connection.credit == 0
    connection.receive(*says(Op.CREDIT_UPDATE, fwd_cnt=700))
    assert connection.credit == 700
    connection.receive(*says(Op.CREDIT_UPDATE, fwd_cnt=700, buf_alloc=100))
    assert connection.credit == 0


def test_credit_goes_on_when_the_counters_wrap() -> None:
    connection = accepted(buf_alloc=1 << 30)
    sent = 0
    for _ in range(5):
        connection.header(Op.RW, 1 << 30)
        sent += 1 << 30
        assert connection.credit == 0
        assert connection.receive(*says(Op.CREDIT_UPDATE, buf_alloc=1 << 30, fwd_cnt=sent)) is Event.CREDIT
        assert connection.credit == 1 << 30


def test_a_peer_cannot_have_consumed_what_was_never_sent() -> None:
    connection = accepted()
    connection.header(Op.RW, 10)
    assert connection.receive(*says(Op.CREDIT_UPDATE, fwd_cnt=11)) is Event.VIOLATION


def test_a_peer_that_sends_more_than_it_may() -> None:
    connection = accepted()
    assert connection.receive(*says(Op.RW, length=BUF_ALLOC)) is Event.DATA
    connection.consumed(10)
    assert connection.receive(*says(Op.RW, length=10)) is Event.DATA
    assert connection.receive(*says(Op.RW, length=1)) is Event.VIOLATION


@pytest.mark.parametrize(
    ("buf_alloc", "after"),
    [(BUF_ALLOC, BUF_ALLOC * 3 // 4), (2**32 - 1, BUF_ALLOC * 3 // 4), (1000, 750), (1, 1), (0, 1)],
)
def test_the_peer_is_told_before_what_it_can_buffer_itself_is_consumed(buf_alloc: int, after: int) -> None:
    connection = accepted(buf_alloc)
    connection.receive(*says(Op.RW, length=BUF_ALLOC, buf_alloc=buf_alloc))
    connection.consumed(after - 1)
    assert connection.speak() is None
    connection.consumed(1)
    update = connection.speak()
    assert update is not None
    assert (update.op, update.fwd_cnt) == (Op.CREDIT_UPDATE, after)
    assert connection.speak() is None


def test_a_peer_that_can_buffer_less_than_it_could_is_told_at_once() -> None:
    connection = accepted(BUF_ALLOC)
    connection.receive(*says(Op.RW, length=1000, buf_alloc=BUF_ALLOC))
    connection.consumed(1000)
    assert connection.receive(*says(Op.CREDIT_UPDATE, buf_alloc=1400)) is Event.CREDIT
    assert connection.speak() is None
    assert connection.receive(*says(Op.CREDIT_UPDATE, buf_alloc=1333)) is Event.CREDIT
    update = connection.speak()
    assert update is not None
    assert (update.op, update.fwd_cnt) == (Op.CREDIT_UPDATE, 1000)


def test_any_packet_tells_what_an_update_would_have() -> None:
    connection = accepted()
    connection.receive(*says(Op.RW, length=BUF_ALLOC))
    connection.consumed(750)
    assert connection.wanted
    assert connection.header(Op.RW, 1).fwd_cnt == 750
    assert not connection.wanted


def test_a_peer_that_asks_is_told() -> None:
    connection = accepted()
    connection.receive(*says(Op.CREDIT_REQUEST))
    update = connection.speak()
    assert update is not None
    assert update.op == Op.CREDIT_UPDATE


def test_our_shutdowns_add_up() -> None:
    connection = accepted()
    connection.shut_down(SHUTDOWN_SEND)
    first = connection.speak()
    connection.shut_down(SHUTDOWN_SEND)
    assert connection.speak() is None
    connection.shut_down(SHUTDOWN_RECEIVE)
    second = connection.speak()
    assert first is not None
    assert second is not None
    assert (first.op, first.flags) == (Op.SHUTDOWN, SHUTDOWN_SEND)
    assert (second.op, second.flags) == (Op.SHUTDOWN, SHUTDOWN_BOTH)
    assert connection.credit == 0


def test_a_peer_that_reads_no_more_gets_nothing_but_may_send() -> None:
    connection = accepted()
    assert connection.receive(*says(Op.SHUTDOWN, flags=SHUTDOWN_RECEIVE)) is Event.SHUTDOWN
    assert connection.credit == 0
    assert connection.receive(*says(Op.RW, length=5)) is Event.DATA


def test_a_peer_that_ended_its_half_may_still_read() -> None:
    connection = accepted()
    connection.receive(*says(Op.SHUTDOWN, flags=SHUTDOWN_SEND))
    assert connection.credit == 1000
    assert connection.receive(*says(Op.CREDIT_UPDATE)) is Event.CREDIT
    assert connection.receive(*says(Op.RW, length=1)) is Event.VIOLATION


def test_the_last_word() -> None:
    assert accepted().reset() == Header(3, 16, 5000, 1024, 0, 1, Op.RST, 0, BUF_ALLOC, 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1 << 20), st.integers(0, 3), st.integers(0, 1 << 32))))
def test_whatever_a_peer_says_we_keep_to_its_credit(packets: list[tuple[int, int, int, int]]) -> None:
    """The model: never more sent and not consumed than the last buf_alloc; never more taken than we allowed."""
    connection = accepted()
    sent = taken = 0
    for op, number, flags, fwd_cnt in packets:
        event = connection.receive(op, number, flags, number, fwd_cnt & 0xFFFFFFFF)
        if event in (Event.VIOLATION, Event.RESET):
            return
        if event is Event.DATA:
            taken += number
            assert taken <= BUF_ALLOC
        under_way = (sent - fwd_cnt) & 0xFFFFFFFF
        assert connection.credit <= max(number - under_way, 0)
        part = connection.credit // 2 + connection.credit % 2
        sent += connection.header(Op.RW, part).len
