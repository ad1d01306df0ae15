# SPDX-License-Identifier: Apache-2.0
"""A guest that keeps the rules and a host, each doing anything at any time: no byte is lost, added or reordered, and
nobody is sent more than there is credit for."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from vsock_rig import HOST_PORT, FakeStream, Rig

from enclavekit.testing.virtio import PacketLayout
from enclavekit.virtio.vsock_connection import BUF_ALLOC
from enclavekit.virtio.vsock_host import Outcome
from enclavekit.virtio.vsock_packet import SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, Header, Op

GUEST_BUFFER = 10_000
"""Bytes that the guest buffers for a connection."""

LISTENING, SILENT = 7000, 7001
"""Ports of the guest: it accepts, it refuses."""


@dataclass(eq=False)
class Peer:
    """A connection as the guest and the host program see it."""

    port: int
    """Of the guest."""
    other: int
    """Of the host."""
    stream: FakeStream
    said: bytearray = field(default_factory=bytearray)
    """By the guest."""
    heard: bytearray = field(default_factory=bytearray)
    given: bytearray = field(default_factory=bytearray)
    """By the host program."""
    consumed: int = 0
    buf_alloc: int = BUF_ALLOC
    fwd_cnt: int = 0
    ends: int = 0
    """What the guest has shut down."""
    host_ends: int = 0
    """What the device says of the host."""
    finished: bool = False
    alive: bool = True


SIZES = st.sampled_from([1, 100, 3000, 4052, 4053, 30_000])


def numbered(start: int, size: int) -> bytes:
    """Bytes that are nowhere the same: a counter, four bytes each, from position ``start`` on."""
    first = start // 4
    data = b"".join(number.to_bytes(4, "little") for number in range(first, (start + size) // 4 + 1))
    return data[start - 4 * first :][:size]


class VsockMachine(RuleBasedStateMachine):
    """Rules are what guests and hosts do."""

    peers = Bundle("peers")

    @initialize(layout=st.sampled_from(PacketLayout), size=st.sampled_from([16, 64]))
    def boot(self, layout: PacketLayout, size: int) -> None:
        self.rig = Rig(layout=layout, size=size)
        self.all: list[Peer] = []
        self.opening: dict[int, FakeStream] = {}
        self.next_port = 20_000

    def send(self, peer: Peer, op: Op, payload: bytes = b"", flags: int = 0) -> None:
        self.rig.guest.send(
            op, peer.port, peer.other, payload, flags=flags, buf_alloc=GUEST_BUFFER, fwd_cnt=peer.consumed
        )
        self.rig.work()

    def living(self) -> list[Peer]:
        return [peer for peer in self.all if peer.alive]

    def listen(self) -> None:
        """The guest takes all that has come."""
        while packets := self.rig.receive():
            for header, payload in packets:
                self.hear(header, payload)

    def hear(self, header: Header, payload: bytes) -> None:
        assert (header.src_cid, header.dst_cid, header.type) == (3, 16, 1)
        if header.op == Op.REQUEST:
            stream = self.opening.pop(header.dst_port, None)
            assert stream is not None
            peer = Peer(header.dst_port, header.src_port, stream)
            if header.dst_port == SILENT:
                self.send(peer, Op.RST)
                return
            self.all.append(peer)
            self.send(peer, Op.RESPONSE)
            return
        ours = (header.dst_port, header.src_port)
        (peer,) = (peer for peer in self.living() if (peer.port, peer.other) == ours)
        assert header.buf_alloc == BUF_ALLOC or header.op == Op.RST
        peer.buf_alloc, peer.fwd_cnt = header.buf_alloc, header.fwd_cnt
        match header.op:
            case Op.RW:
                assert not peer.host_ends & SHUTDOWN_SEND
                peer.heard += payload
                assert len(peer.heard) - peer.consumed <= GUEST_BUFFER
            case Op.SHUTDOWN:
                peer.host_ends |= header.flags
                if peer.host_ends == SHUTDOWN_BOTH:  # as Linux answers
                    peer.alive = False
                    self.send(peer, Op.RST)
            case Op.RST:
                peer.alive = False
            case _:
                assert header.op in (Op.RESPONSE, Op.CREDIT_UPDATE)

    @rule(target=peers)
    def guest_dials(self) -> Peer:
        self.next_port += 1
        self.rig.guest.send(Op.REQUEST, self.next_port, HOST_PORT, buf_alloc=GUEST_BUFFER)
        self.rig.work()
        peer = Peer(self.next_port, HOST_PORT, self.rig.route.streams[-1])
        self.all.append(peer)
        return peer

    @rule(target=peers)
    def host_dials(self) -> Peer:
        self.opening[LISTENING] = self.rig.open(LISTENING)
        self.listen()
        assert self.rig.outcomes.pop()[0] is Outcome.ACCEPTED
        return self.all[-1]

    @rule()
    def host_dials_in_vain(self) -> None:
        stream = self.opening[SILENT] = self.rig.open(SILENT)
        self.listen()
        assert self.rig.outcomes.pop()[0] is Outcome.REFUSED
        assert stream.closed

    @rule(peer=peers, size=SIZES)
    def guest_sends(self, peer: Peer, size: int) -> None:
        size = min(size, 4000, peer.buf_alloc - (len(peer.said) - peer.fwd_cnt))
        if peer.alive and size and not peer.ends & SHUTDOWN_SEND and not peer.host_ends & SHUTDOWN_RECEIVE:
            payload = numbered(len(peer.said), size)
            peer.said += payload
            self.send(peer, Op.RW, payload)

    @rule(peer=peers, size=SIZES)
    def host_gives(self, peer: Peer, size: int) -> None:
        if not (peer.finished or peer.stream.closed or peer.stream.on_event is None):
            data = numbered(len(peer.given), size)
            peer.given += data
            peer.stream.give(data)
            self.rig.work()

    @rule(peer=peers, room=st.sampled_from([0, 100, 1 << 30]))
    def host_reads(self, peer: Peer, room: int) -> None:
        if not peer.stream.closed and peer.stream.on_event is not None:
            peer.stream.make_room(room)
            self.rig.work()

    @rule()
    def guest_listens(self) -> None:
        self.listen()

    @rule(peer=peers)
    def guest_reads(self, peer: Peer) -> None:
        if peer.alive:
            peer.consumed = len(peer.heard)
            self.send(peer, Op.CREDIT_UPDATE)

    @rule(peer=peers)
    def host_ends_its_half(self, peer: Peer) -> None:
        if not (peer.finished or peer.stream.closed or peer.stream.on_event is None):
            peer.finished = True
            peer.stream.finish()
            self.rig.work()

    @rule(peer=peers)
    def guest_ends_its_half(self, peer: Peer) -> None:
        if peer.alive and not peer.ends:
            peer.ends = SHUTDOWN_SEND
            self.send(peer, Op.SHUTDOWN, flags=SHUTDOWN_SEND)

    @rule(peer=consumes(peers))
    def guest_closes(self, peer: Peer) -> None:
        if peer.alive:
            self.send(peer, Op.SHUTDOWN, flags=SHUTDOWN_BOTH)
            self.listen()
            assert peer not in self.living()
            peer.stream.make_room(1 << 30)
            assert peer.stream.sent == peer.said
            assert peer.stream.closed

    @invariant()
    def bytes_come_in_order(self) -> None:
        for peer in getattr(self, "all", ()):
            assert peer.said.startswith(peer.stream.sent)
            assert peer.given.startswith(peer.heard)
            assert len(peer.said) - len(peer.stream.sent) <= BUF_ALLOC

    def teardown(self) -> None:
        """Once both sides read, all arrives, and every half that was ended is seen to end."""
        for peer in getattr(self, "all", ()):
            while peer.alive:
                if not peer.stream.closed:
                    peer.stream.make_room(1 << 30)
                self.listen()
                if peer.consumed == len(peer.heard):
                    break
                self.guest_reads(peer)
            if peer.alive:
                assert (peer.heard, peer.stream.sent) == (peer.given, peer.said)
                assert (peer.host_ends == SHUTDOWN_SEND) == peer.finished
                assert peer.stream.ended == bool(peer.ends)


VsockMachine.TestCase.settings = settings(deadline=None, max_examples=40, stateful_step_count=40)
TestVsockMachine = VsockMachine.TestCase
