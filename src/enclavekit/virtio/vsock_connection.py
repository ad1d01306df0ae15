# SPDX-License-Identifier: Apache-2.0
"""One vsock connection as a machine without I/O: headers in, events out; what it wants to say is asked for.

Source: virtio 1.2 §5.10.6; linux: net/vmw_vsock/virtio_transport_common.c for what guests do. *Peer* is the guest,
*local* is our side.

Credit, in both directions: every packet tells how much its sender can buffer (buf_alloc) and how much it has consumed
(fwd_cnt). A sender never has more under way than the receiver can buffer. Both directions close apart.
"""

from __future__ import annotations

from enum import Enum, auto

from enclavekit.virtio.vsock_packet import (
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    Address,
    Header,
    Op,
)

BUF_ALLOC = 256 * 1024
"""Bytes that we buffer for a connection whose host side does not read."""

MAX_IN_FLIGHT = 1 << 30
"""However much a peer says it can buffer. It also makes a fwd_cnt that runs ahead recognisable."""

COUNTER_MASK = 0xFFFFFFFF


class State(Enum):
    """Of a connection that exists; one that ended is in no table."""

    CONNECTING = auto()
    """We sent REQUEST."""
    REQUESTED = auto()
    """The peer sent REQUEST, and our side has not decided yet."""
    ESTABLISHED = auto()


class Event(Enum):
    """What a packet meant."""

    NOTHING = auto()
    ACCEPTED = auto()
    REFUSED = auto()
    DATA = auto()
    CREDIT = auto()
    SHUTDOWN = auto()
    RESET = auto()
    VIOLATION = auto()
    """The peer broke the protocol: reset the connection."""


TRANSITIONS: dict[State, dict[int, tuple[State, Event]]] = {
    State.CONNECTING: {
        Op.RESPONSE: (State.ESTABLISHED, Event.ACCEPTED),
        Op.RST: (State.CONNECTING, Event.REFUSED),
    },
    State.REQUESTED: {
        Op.RST: (State.REQUESTED, Event.RESET),
    },
    State.ESTABLISHED: {
        Op.RW: (State.ESTABLISHED, Event.DATA),
        Op.CREDIT_UPDATE: (State.ESTABLISHED, Event.CREDIT),
        Op.CREDIT_REQUEST: (State.ESTABLISHED, Event.CREDIT),
        Op.SHUTDOWN: (State.ESTABLISHED, Event.SHUTDOWN),
        Op.RST: (State.ESTABLISHED, Event.RESET),
    },
}
"""What is not here is a violation."""

RW, SHUTDOWN, CREDIT_REQUEST, CREDIT_UPDATE = Op.RW, Op.SHUTDOWN, Op.CREDIT_REQUEST, Op.CREDIT_UPDATE
DATA, CREDIT, REFUSED, RESET = Event.DATA, Event.CREDIT, Event.REFUSED, Event.RESET
ESTABLISHED = State.ESTABLISHED
"""For each packet: to look a member of an Enum up is a call of its own."""

SPOKEN_IN_ORDER = (Op.REQUEST, Op.RESPONSE, Op.CREDIT_UPDATE, Op.SHUTDOWN)


class Connection:
    """Between ``local`` and ``peer``. Made by our REQUEST, or by the peer's: then ``accept`` answers it by RESPONSE."""

    __slots__ = (
        "_fwd_cnt",
        "_peer_buf_alloc",
        "_peer_fwd_cnt",
        "_rx_cnt",
        "_told_fwd_cnt",
        "_transitions",
        "_tx_cnt",
        "_update_after",
        "local",
        "local_shutdown",
        "peer",
        "peer_shutdown",
        "state",
        "wanted",
    )

    def __init__(self, local: Address, peer: Address, *, request: Header | None = None) -> None:
        self.local = local
        self.peer = peer
        self.local_shutdown = 0
        self.peer_shutdown = 0
        self._tx_cnt = self._rx_cnt = self._fwd_cnt = self._told_fwd_cnt = 0
        self._peer_buf_alloc = self._peer_fwd_cnt = 0
        self._update_after = 1
        """Consumed bytes that the peer has not been told of before we tell it unasked."""
        self.wanted: set[Op] = set()
        """What ``speak`` has a packet for."""
        self._enter(State.CONNECTING if request is None else State.REQUESTED)
        if request is None:
            self.wanted.add(Op.REQUEST)
        else:
            self._resize(request.buf_alloc)
            self._peer_fwd_cnt = request.fwd_cnt

    def _enter(self, state: State) -> None:
        self.state = state
        self._transitions = TRANSITIONS[state]

    def _resize(self, buf_alloc: int) -> None:
        """The peer can buffer as much. A newer Linux has no more than that under way itself, so it may wait to hear of
        that much. But a word interrupts it: so it hears of three quarters, and goes on meanwhile."""
        self._peer_buf_alloc = min(buf_alloc, MAX_IN_FLIGHT)
        self._update_after = max(min(buf_alloc, BUF_ALLOC) * 3 // 4, 1)
        self.consumed(0)

    # What the peer says

    def receive(self, op: int, count: int, flags: int, buf_alloc: int, fwd_cnt: int) -> Event:
        """Take what a packet's header says; the ``count`` bytes of payload are the caller's, who says ``consumed`` when
        they are gone."""
        transition = self._transitions.get(op)
        if transition is None:
            return Event.VIOLATION
        state, event = transition
        if event is REFUSED or event is RESET:
            return event
        if buf_alloc != self._peer_buf_alloc:
            self._resize(buf_alloc)
        self._peer_fwd_cnt = fwd_cnt
        if (self._tx_cnt - fwd_cnt) & COUNTER_MASK > MAX_IN_FLIGHT:
            return Event.VIOLATION  # it has consumed what was never sent
        if event is DATA:
            self._rx_cnt += count
            if self.peer_shutdown & SHUTDOWN_SEND or self._rx_cnt - self._fwd_cnt > BUF_ALLOC:
                return Event.VIOLATION
        elif event is CREDIT:
            if op == CREDIT_REQUEST:
                self.wanted.add(CREDIT_UPDATE)
        elif event is Event.SHUTDOWN:
            self.peer_shutdown |= flags & SHUTDOWN_BOTH
        elif state is not self.state:
            self._enter(state)
        return event

    # What our side does

    def accept(self) -> None:
        """Our side takes the connection that the peer asked for."""
        self._enter(State.ESTABLISHED)
        self.wanted.add(Op.RESPONSE)

    @property
    def credit(self) -> int:
        """Bytes that may be sent now; 0 as well where either side has ended this direction."""
        if (
            self.state is not ESTABLISHED
            or self.local_shutdown & SHUTDOWN_SEND
            or self.peer_shutdown & SHUTDOWN_RECEIVE
        ):
            return 0
        in_flight = (self._tx_cnt - self._peer_fwd_cnt) & COUNTER_MASK
        return max(self._peer_buf_alloc - in_flight, 0)

    def consumed(self, count: int) -> None:
        """Our side has taken (or thrown away) ``count`` bytes that the peer sent."""
        self._fwd_cnt += count
        if self._fwd_cnt - self._told_fwd_cnt >= self._update_after:
            self.wanted.add(CREDIT_UPDATE)

    def shut_down(self, flags: int) -> None:
        """Our side will receive (``SHUTDOWN_RECEIVE``) or send (``SHUTDOWN_SEND``) no more."""
        if flags & ~self.local_shutdown:
            self.local_shutdown |= flags
            self.wanted.add(Op.SHUTDOWN)

    # What we say

    def speak(self) -> Header | None:
        """The next packet without payload that is to be sent."""
        if not self.wanted:
            return None
        op = next(op for op in SPOKEN_IN_ORDER if op in self.wanted)
        self.wanted.remove(op)
        return self.header(op)

    def reset(self) -> Header:
        """An RST: the last word."""
        return self.header(Op.RST)

    def header(self, op: Op, count: int = 0) -> Header:
        """Of a packet, of RW with ``count`` bytes, at most ``credit``, which are thereby sent."""
        self._tx_cnt += count
        self._told_fwd_cnt = fwd_cnt = self._fwd_cnt
        if self.wanted:
            self.wanted.discard(CREDIT_UPDATE)
        (cid, port), (peer_cid, peer_port) = self.local, self.peer
        flags = self.local_shutdown if op is SHUTDOWN else 0
        return tuple.__new__(
            Header,
            (cid, peer_cid, port, peer_port, count, TYPE_STREAM, op, flags, BUF_ALLOC, fwd_cnt & COUNTER_MASK),
        )
