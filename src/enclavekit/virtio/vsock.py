# SPDX-License-Identifier: Apache-2.0
"""virtio-vsock device: carries packets between two virtqueues and the host's byte streams.

Source: virtio 1.2 §5.10. It owns the table of connections, hands requests of the guest to routes, moves bytes, and
answers what belongs to nobody with RST (but never an RST). It knows neither sockets nor who runs the guest.

Work is done in ``process``, in bounded portions. The tx queue is drained whatever the state of the rx queue. Rx buffers
are filled before, for whoever has been waiting, and after: answers before data, data in turns of at most ``MAX_TURN``
bytes a connection. Memory is bounded: per connection by the credit that it gives, answers by ``MAX_REPLIES``,
connections by ``MAX_CONNECTIONS``.

What each packet passes is written for few steps: a round trip runs through it with cold caches, and every call counts,
and every member of an Enum that is looked up.

It is longer than other modules: all of it works on the one table of connections and its two queues, and what could be
told apart, the state of a connection, packets, streams, routes, has modules of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from typing import NamedTuple

from enclavekit.errors import VirtqueueError
from enclavekit.virtio.queue import MAX_SIZE, VIRTIO_F_INDIRECT_DESC, Chain, Virtqueue
from enclavekit.virtio.vsock_connection import CREDIT, DATA, RW, Connection, Event
from enclavekit.virtio.vsock_host import Outcome, Pending, Route, Stream, Timer
from enclavekit.virtio.vsock_packet import (
    CONFIG,
    HEADER,
    HEADER_SIZE,
    PARENT_CID,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    Address,
    Header,
    Op,
)

VIRTIO_F_VERSION_1 = 1 << 32

RX, TX = 0, 1
"""Queues: to the guest, from the guest. The third, for events, stays with whoever runs the guest."""

FIRST_HOST_PORT, END_HOST_PORT = 1 << 30, 1 << 31
"""Ports that connections from the host come from."""

MAX_CONNECTIONS = 16384
MAX_REPLIES = 8192
SPARE_READY = 64
"""Connections that have ended and are still in the row of those that want to send."""
MAX_TURN = 64 * 1024
MAX_PARTS = 64
"""Pieces of memory in one system call; a chain in more pieces is copied, or used as far as they go."""
MANY = 8
"""Packets of one turn that are worth an interrupt of their own."""
TX_BATCH = 64
RX_BATCH = 256

BULK = 4096
"""Bytes in one go from which on the guest mostly does not wait for its tx buffers: each return of some interrupts it.

It does where its program has used up the credit: Linux 6.12 (not 6.1) wakes the writer for new credit only once the
packets are back. So they go back with whatever is sent to the guest, which credit is, and after a packet shorter than
the one before: as long as there is credit, and more to send, all are of one size.
"""
KEEP_S = 0.001
"""They are kept about as long (epoll waits for whole milliseconds), and no more chains than an eighth of the queue."""

CLOSE_TIMEOUT_S = 2.0
"""The guest's time to confirm that a connection is closed."""


class _Link:
    """A connection with its stream."""

    __slots__ = (
        "connection",
        "ending",
        "hung_up",
        "key",
        "live",
        "on_outcome",
        "outgoing",
        "queued",
        "readable",
        "stream",
        "timer",
        "turn",
    )

    def __init__(self, connection: Connection, stream: Stream) -> None:
        self.connection = connection
        self.key = (*connection.local, connection.peer.port)
        self.stream = stream
        self.live = True
        """It is in the table."""
        self.outgoing = bytearray()
        """What the guest sent and the stream has not taken."""
        self.readable = False
        self.turn = 1
        """Rx buffers of its next turn: more where much comes, for each costs time to prepare."""
        self.ending = False
        """The stream's end is near: read on until it comes."""
        self.hung_up = False
        """Nobody reads the stream any more."""
        self.queued = False
        self.timer: Timer | None = None
        self.on_outcome: Callable[[Outcome, int], None] | None = None


class _RxBuffer(NamedTuple):
    """A chain of the rx queue, cut into the header's place and the payload's."""

    head: int
    header: list[memoryview]
    body: list[memoryview]
    room: int


def split(parts: list[memoryview], size: int) -> tuple[list[memoryview], list[memoryview]]:
    """Cut a row of buffers after ``size`` bytes; the first half is shorter where there are not as many."""
    for index, part in enumerate(parts):
        if len(part) > size:
            return [*parts[:index], part[:size]], [part[size:], *parts[index + 1 :]]
        size -= len(part)
        if not size:
            return parts[: index + 1], parts[index + 1 :]
    return parts, []


class VsockDevice:
    """The device of the guest ``guest_cid``. ``routes`` says who lives at which CID and may change at any time.

    Connections from the host come from ``host_cid``, unless ``open`` is told of another source.
    """

    features = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC
    queue_count = 2
    queue_names = ("rx", "tx")

    def __init__(
        self,
        guest_cid: int,
        routes: Mapping[int, Route],
        call_later: Callable[[float, Callable[[], None]], Timer],
        host_cid: int = PARENT_CID,
    ) -> None:
        self.guest_cid = guest_cid
        self.routes = routes
        self.config = CONFIG.pack(guest_cid)
        self.error: VirtqueueError | None = None
        """Why the device is broken, until its queues are started anew."""
        self.received = self.sent = 0
        """Bytes of payload, from the guest and to it."""
        self.max_connections = MAX_CONNECTIONS
        """At once, whoever asked for them."""
        self._gone = False
        self._host_cid = host_cid
        self._call_later = call_later
        self._rx: Virtqueue | None = None
        self._tx: Virtqueue | None = None
        self._spare: deque[_RxBuffer] = deque()
        self._done: list[int] = []
        """Chains of the tx queue that are to be given back."""
        self._returning: Timer | None = None
        self._last_size = 0
        """Bytes of payload of the last packet from the guest."""
        self._links: dict[tuple[int, int, int], _Link] = {}
        self._draining: set[_Link] = set()
        """Closed by the guest, but not all that it sent is delivered."""
        self._ready: deque[_Link] = deque()
        self._replies: deque[Header] = deque()
        self._host_port = FIRST_HOST_PORT

    @property
    def connections(self) -> int:
        """Open ones."""
        return len(self._links)

    # For the transport

    def start(self, index: int, queue: Virtqueue) -> None:
        """A queue runs from now on."""
        self.error = None
        if index == RX:
            self._spare.clear()  # of a queue that it takes the place of
            self._rx = queue
        else:
            self._done.clear()
            self._tx = queue

    def stop(self, index: int) -> None:
        """A queue's last moment, as ``Virtqueue.base`` will be read; ends all connections, for the guest is reset."""
        try:
            self._drain_tx(MAX_SIZE)
            self._return_tx()
        except VirtqueueError as error:
            self._break(error)
        if self._rx is not None:
            self._rx.put_back(len(self._spare))
        self._spare.clear()
        if index == RX:
            self._rx = None
        else:
            self._tx = None
        self.reset()

    def peek(self) -> bool:
        """Whether the guest has sent something. It need not tell us of more before the next ``process``."""
        return self._tx is not None and self._tx.peek()

    def process(self) -> bool:
        """Do what can be done, in bounded time; True when there is more."""
        try:
            more = False
            if self._ready or self._replies:
                more = self._fill_rx()
            if self._drain_tx(TX_BATCH):
                more = True
            if (self._ready or self._replies) and self._fill_rx():
                more = True
            return more
        except VirtqueueError as error:
            self._break(error)
            return False

    def reset(self) -> None:
        """End all connections. What the guest sent before is still delivered."""
        for link in list(self._links.values()):
            self._drop(link, Outcome.ENDED, drain=True)
        self._ready.clear()
        self._replies.clear()

    def end(self) -> None:
        """Reset, for the last time: the guest is gone. What it sent is still being delivered."""
        self._gone = True
        self.reset()

    def close(self) -> None:
        """End, and wait for nobody."""
        self.end()
        for link in self._draining:
            link.stream.close()
        self._draining.clear()

    def _break(self, error: VirtqueueError) -> None:
        self.error = error
        self._rx = self._tx = None
        self._spare.clear()
        self._done.clear()
        self.reset()

    # From the host

    def open(
        self,
        port: int,
        stream: Stream,
        timeout_s: float,
        on_outcome: Callable[[Outcome, int], None],
        source: Address | None = None,
    ) -> None:
        """Connect ``stream`` to a port of the guest. ``on_outcome`` gets the host's port too; if it is not accepted the
        stream is closed."""
        link = _Link(Connection(source or self._next_source(), Address(self.guest_cid, port)), stream)
        if self._gone or self.error is not None or self._full or link.key in self._links:
            stream.close()
            on_outcome(Outcome.ENDED if self._gone else Outcome.REFUSED, 0)
            return
        link.on_outcome = on_outcome
        link.timer = self._call_later(timeout_s, partial(self._give_up, link, Outcome.TIMED_OUT))
        self._links[link.key] = link
        self._queue(link)

    @property
    def _full(self) -> bool:
        return len(self._links) + len(self._draining) >= self.max_connections

    def _next_source(self) -> Address:
        port = self._host_port
        self._host_port = port + 1 if port + 1 < END_HOST_PORT else FIRST_HOST_PORT
        return Address(self._host_cid, port)

    def _give_up(self, link: _Link, outcome: Outcome) -> None:
        self._reply(link.connection.reset())
        self._drop(link, outcome, drain=True)

    def _drop(self, link: _Link, outcome: Outcome, *, drain: bool = False) -> None:
        del self._links[link.key]
        link.live = False
        if link.queued and len(self._ready) > 2 * len(self._links) + SPARE_READY:
            self._ready = deque(other for other in self._ready if other.live)  # a guest may never give rx buffers
        if link.timer is not None:
            link.timer.cancel()
        if drain and link.outgoing:
            self._draining.add(link)
        else:
            link.stream.close()
        if link.on_outcome is not None:
            link.on_outcome(outcome, 0)

    def _on_stream(self, link: _Link, events: int) -> None:
        if events != EPOLLIN:
            self._on_rare(link, events)
        if not link.live:
            return
        if not link.connection.local_shutdown & SHUTDOWN_SEND:
            link.readable = True
        if not link.queued:
            link.queued = True
            self._ready.append(link)

    def _on_rare(self, link: _Link, events: int) -> None:
        """There is room, or an end."""
        if events & EPOLLOUT and link.outgoing:
            self._flush(link)
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            link.ending = True
        if events & (EPOLLHUP | EPOLLERR):
            link.hung_up = True
            if (link.connection.local_shutdown & SHUTDOWN_SEND) or link.connection.peer_shutdown & SHUTDOWN_RECEIVE:
                link.connection.shut_down(SHUTDOWN_BOTH)

    # Guest to host

    def _drain_tx(self, limit: int) -> bool:
        queue = self._tx
        if queue is None or (chain := queue.pop()) is None:
            return False
        done, received = self._done, self.received
        while chain is not None:
            before_last = self.received
            self._take(chain)
            done.append(chain.head)  # given back afterwards: somebody waits for what the next packet brings
            limit -= 1
            chain = queue.pop() if limit else None
        last_size, self._last_size = self._last_size, self.received - before_last
        if self.received - received < BULK or self._last_size < last_size or len(done) >= queue.size // 8:
            self._return_tx()
        elif self._returning is None:
            self._returning = self._call_later(KEEP_S, self._return_tx)
        return not limit

    def _return_tx(self) -> None:
        """Give back what was read."""
        if self._returning is not None:
            self._returning.cancel()
            self._returning = None
        done, self._done = self._done, []
        if self._tx is not None and done:
            self._tx.push_read(done)
            self._tx.signal()

    def _take(self, chain: Chain) -> None:
        """One packet from the guest."""
        head, payload, writable = chain
        if writable:
            raise VirtqueueError(f"tx queue: the chain from descriptor {head} is writable")
        first = payload[0]
        if len(first) == HEADER_SIZE:
            payload = payload[1:]
        else:
            parts, payload = split(payload, HEADER_SIZE)
            first = memoryview(b"".join(parts))
            if len(first) < HEADER_SIZE:
                raise VirtqueueError(f"tx queue: packet of {len(first)} bytes, a header has {HEADER_SIZE}")
        fields = HEADER.unpack(first)
        source, destination, source_port, port, count, kind, op, flags, buf_alloc, fwd_cnt = fields
        size = len(payload[0]) if len(payload) == 1 else sum(map(len, payload))
        if size < count:
            raise VirtqueueError(f"tx queue: packet says {count} bytes of payload, {size} follow")
        if source != self.guest_cid:
            return
        link = self._links.get((destination, port, source_port))
        if link is None or kind != TYPE_STREAM:
            self._refer(Header._make(fields))
            return
        event = link.connection.receive(op, count, flags, buf_alloc, fwd_cnt)
        if event is DATA:
            if size > count:
                payload = split(payload, count)[0]
            self._deliver(link, payload, count)
        elif event is not CREDIT:
            self._react(link, event, op)
            return
        if link.readable or link.connection.wanted:
            self._queue(link)

    def _refer(self, header: Header) -> None:
        """A packet of no connection."""
        if header.type != TYPE_STREAM:
            self._reply(header.reset(), header.op)
        elif header.op == Op.REQUEST:
            self._accept(header)
        else:
            self._reply(header.reset(), header.op)

    def _accept(self, header: Header) -> None:
        source = Address(header.src_cid, header.src_port)
        route = self.routes.get(header.dst_cid)
        dialed = None
        if route is not None and not self._full:
            dialed = route.dial(source, header.dst_port)
        if dialed is None:
            self._reply(header.reset())
            return
        stream = dialed.stream if isinstance(dialed, Pending) else dialed
        link = _Link(Connection(Address(header.dst_cid, header.dst_port), source, request=header), stream)
        self._links[link.key] = link
        if isinstance(dialed, Pending):
            dialed.then(partial(self._answer, link))
        else:
            self._answer(link, True)

    def _answer(self, link: _Link, accepted: bool) -> None:
        """The one whom the guest dialed has decided."""
        if not link.live:
            return  # the guest did not wait
        if not accepted:
            self._give_up(link, Outcome.REFUSED)
            return
        link.connection.accept()
        link.stream.attach(partial(self._on_stream, link))
        self._queue(link)

    def _react(self, link: _Link, event: Event, op: int) -> None:
        connection = link.connection
        match event:
            case Event.ACCEPTED:
                self._opened(link)
            case Event.SHUTDOWN:
                if connection.peer_shutdown == SHUTDOWN_BOTH:
                    self._give_up(link, Outcome.ENDED)
                    return
                if connection.peer_shutdown & SHUTDOWN_SEND and not link.outgoing:
                    link.stream.end()
                if connection.peer_shutdown & SHUTDOWN_RECEIVE:
                    link.stream.refuse()
            case Event.REFUSED:
                self._drop(link, Outcome.REFUSED)
                return
            case Event.RESET:
                # After its last byte the guest may forget a connection before a slow host has read all.
                self._drop(link, Outcome.ENDED, drain=bool(connection.peer_shutdown & SHUTDOWN_SEND))
                return
            case Event.VIOLATION:
                self._reply(connection.reset(), op)
                self._drop(link, Outcome.REFUSED)
                return
        self._queue(link)

    def _opened(self, link: _Link) -> None:
        if link.timer is not None:
            link.timer.cancel()
            link.timer = None
        on_outcome, link.on_outcome = link.on_outcome, None
        if on_outcome is not None:
            on_outcome(Outcome.ACCEPTED, link.connection.local.port)
        link.stream.attach(partial(self._on_stream, link))

    def _deliver(self, link: _Link, payload: list[memoryview], size: int) -> None:
        if not size:
            return
        self.received += size
        if link.connection.local_shutdown & SHUTDOWN_RECEIVE:
            link.connection.consumed(size)
            return
        if link.outgoing:
            link.outgoing += b"".join(payload)
            return
        if len(payload) > MAX_PARTS:
            payload = [memoryview(b"".join(payload))]
        try:
            sent = link.stream.send(payload)
        except OSError:
            link.connection.consumed(size)
            link.connection.shut_down(SHUTDOWN_RECEIVE)
            return
        link.connection.consumed(sent)
        if sent < size:
            link.outgoing += b"".join(split(payload, sent)[1] if sent else payload)

    def _flush(self, link: _Link) -> None:
        """Deliver what waits."""
        try:
            sent = link.stream.send([link.outgoing])
        except OSError:
            sent = len(link.outgoing)
            link.connection.shut_down(SHUTDOWN_RECEIVE)
        del link.outgoing[:sent]
        link.connection.consumed(sent)
        if link.outgoing:
            return
        if link in self._draining:
            self._draining.remove(link)
            link.stream.close()
        elif link.connection.peer_shutdown & SHUTDOWN_SEND:
            link.stream.end()

    # Host to guest

    def _reply(self, header: Header, cause: int = 0) -> None:
        """``cause``: what it answers."""
        if cause != Op.RST and len(self._replies) < MAX_REPLIES:
            self._replies.append(header)

    def _queue(self, link: _Link) -> None:
        if not link.queued and (link.connection.wanted or (link.readable and link.connection.credit > 0)):
            link.queued = True
            self._ready.append(link)

    def _fill_rx(self) -> bool:
        if self._rx is None or not (self._replies or self._ready):
            return False
        budget = RX_BATCH
        while budget > 0 and (self._replies or self._ready) and (self._spare or self._find_buffer()):
            if self._replies:
                self._put(self._spare.popleft(), self._replies.popleft())
                budget -= 1
                continue
            link = self._ready.popleft()
            link.queued = False
            connection = link.connection
            if not link.live:
                continue
            if connection.wanted and (header := connection.speak()) is not None:
                self._put(self._spare.popleft(), header)
                budget -= 1
                if header.op == Op.SHUTDOWN and header.flags == SHUTDOWN_BOTH and link.timer is None:
                    link.timer = self._call_later(CLOSE_TIMEOUT_S, partial(self._give_up, link, Outcome.ENDED))
            else:
                packets = self._forward(link)
                budget -= packets
                if packets >= MANY:
                    self._rx.signal()  # the guest begins while the next turn is read
            if link.readable or connection.wanted:
                self._queue(link)
        if self._done:
            self._return_tx()
        self._rx.signal()
        if not self._spare:
            self._find_buffer()  # beforehand: looking takes longer than anything else here
        return budget <= 0

    def _find_buffer(self) -> bool:
        """One more spare, if the guest has given one."""
        assert self._rx is not None  # noqa: S101 - only called while filling it
        chain = self._rx.pop()
        if chain is None:
            return False
        head, readable, writable = chain
        if readable:
            raise VirtqueueError(f"rx queue: the chain from descriptor {head} is readable")
        if len(writable) == 1:
            (whole,) = writable
            room = len(whole) - HEADER_SIZE
            header, body = [whole], [whole[HEADER_SIZE:]]
        else:
            header, body = split(writable, HEADER_SIZE)
            body = body[:MAX_PARTS]
            room = sum(map(len, body))
        if room <= 0:
            raise VirtqueueError(
                f"rx queue: chain of {sum(map(len, writable))} bytes, a packet needs more than {HEADER_SIZE}"
            )
        self._spare.append(tuple.__new__(_RxBuffer, (head, header, body, room)))
        return True

    def _forward(self, link: _Link) -> int:
        """Read the stream straight into rx buffers; returns the number of packets."""
        limit = min(link.connection.credit, MAX_TURN)
        if not limit or not link.readable:
            return 0
        buffer = self._spare.popleft()
        taken, parts, room = [buffer], buffer.body, buffer.room
        while (
            len(taken) < link.turn and room < limit and len(parts) < MAX_PARTS and (self._spare or self._find_buffer())
        ):
            buffer = self._spare.popleft()
            taken.append(buffer)
            parts = parts + buffer.body
            room += buffer.room
        if room > limit:
            parts, room = split(parts, limit)[0], limit
        count = link.stream.receive(parts)
        packets = 0
        if count:
            # Less than there was room for: that was all, unless the stream ends.
            link.readable = count == room or link.ending
            if count == room:
                link.turn = min(link.turn * 4, MAX_PARTS)
            elif link.turn > 1:
                link.turn //= 2
            header = link.connection.header(RW, count)
            for buffer in taken:
                size = buffer.room if buffer.room < count else count
                if size != header.len:
                    header = header._replace(len=size)  # most are as long as the one before
                self._put(buffer, header, size)
                packets += 1
                count -= size
                if not count:
                    break
        else:
            link.readable = False
            if count == 0:
                link.connection.shut_down(SHUTDOWN_BOTH if link.hung_up else SHUTDOWN_SEND)
        if packets < len(taken):
            self._spare.extendleft(reversed(taken[packets:]))
        return packets

    def _put(self, buffer: _RxBuffer, header: Header, size: int = 0) -> None:
        """Send a packet whose payload is already in its place."""
        assert self._rx is not None  # noqa: S101
        if len(buffer.header) == 1:
            HEADER.pack_into(buffer.header[0], 0, *header)
        else:
            data = bytes(header)
            for part in buffer.header:
                part[:] = data[: len(part)]
                data = data[len(part) :]
        self._rx.push(buffer.head, HEADER_SIZE + size)
        self.sent += size
