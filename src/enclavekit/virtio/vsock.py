# SPDX-License-Identifier: Apache-2.0
"""virtio-vsock device (virtio 1.2 §5.10): stream connections between a guest and host sockets.

Packets come out of the TX queue, replies and data go into the RX queue. Each side tells the other how many bytes it can
take in (buf_alloc) and has consumed (fwd_cnt); nobody sends more than that credit, so a slow reader holds its writer,
not our memory. Half-close keeps the other half: a host's end of file is SHUTDOWN(SEND) only.

Where a packet goes is decided by its destination CID, in ``routes``; CIDs that are not there get a RST. TX is drained
whatever happens on RX, else guest and device could wait for each other; replies are queued, and bounded.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from enclavekit.errors import VirtqueueError
from enclavekit.virtio.loop import READ, WRITE, Loop
from enclavekit.virtio.queue import Queue
from enclavekit.virtio.vsock_packet import HEADER, HEADER_SIZE, MAX_PAYLOAD, TYPE_STREAM, Op, Packet, Shutdown

VIRTIO_ID_VSOCK = 19
RX, TX = 0, 1

PARENT_CID = 3
"""Connections that the host makes come from here, as on EC2."""

BUF_ALLOC = 256 * 1024
"""Bytes of a connection that may wait for a slow host socket; Linux's own default."""
CREDIT_STEP = 64 * 1024
"""The guest is told of consumed bytes at least this often."""
MAX_CONNECTIONS = 4096
MAX_REPLIES = 8192
"""More than this many packets waiting for RX buffers: the guest does not read, replies are dropped."""
CONNECT_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 2.0
"""For the guest to answer our full shutdown."""
BURST = 32
"""Packets from one host socket before the next has its turn."""
FIRST_HOST_PORT, LAST_HOST_PORT = 1 << 30, (1 << 31) - 1
U32 = 0xFFFF_FFFF

Key = tuple[int, int, int]
"""Host-side CID, host-side port, guest port."""


class Route(Protocol):
    """What answers for one destination CID."""

    def connect(self, port: int, guest_cid: int, guest_port: int) -> socket.socket | None:
        """A connected non-blocking socket for a guest's dial, or None: nobody listens."""


class Connection:
    """One stream; counters are modulo 2^32."""

    __slots__ = (
        "advertised", "closing", "fwd_cnt", "guest_done", "host_done", "key", "on_open", "on_refused", "opened",
        "peer_buf_alloc", "peer_fwd_cnt", "pending", "pending_size", "socket", "tx_cnt", "waiting",
    )  # fmt: skip

    def __init__(self, key: Key, host: socket.socket) -> None:
        self.key = key
        self.socket = host
        self.opened = False
        self.on_open: Callable[[], None] | None = None
        self.on_refused: Callable[[], None] | None = None
        self.pending: deque[bytes] = deque()  # from the guest, for the host socket
        self.pending_size = 0
        self.fwd_cnt = 0  # bytes of the guest's that the host socket took
        self.advertised = 0  # the fwd_cnt that the guest was last told
        self.tx_cnt = 0  # bytes sent to the guest
        self.peer_buf_alloc = 0
        self.peer_fwd_cnt = 0
        self.guest_done = Shutdown(0)  # what the guest will not do any more
        self.host_done = Shutdown(0)  # what we said that we will not do
        self.waiting = False  # for an RX buffer
        self.closing = False

    def credit(self) -> int:
        """Bytes that the guest can still take in."""
        return max(0, self.peer_buf_alloc - ((self.tx_cnt - self.peer_fwd_cnt) & U32))


class VsockDevice:
    """The device of one guest. All methods belong to the loop's thread."""

    def __init__(self, loop: Loop, guest_cid: int, routes: Mapping[int, Route]) -> None:
        self._loop = loop
        self.guest_cid = guest_cid
        self._routes = routes
        self._queues: list[Queue] = []
        self._notify: Callable[[int], None] = lambda _: None
        self._connections: dict[Key, Connection] = {}
        self._replies: deque[bytes] = deque()
        self._starved: list[Connection] = []
        self._next_port = FIRST_HOST_PORT
        self.broken: VirtqueueError | None = None
        """What the guest's driver did; nothing is processed any more until a reset."""

    # ---- transport ----

    def config(self) -> bytes:
        """The configuration space: guest_cid."""
        return self.guest_cid.to_bytes(8, "little")

    def activate(self, queues: list[Queue], notify: Callable[[int], None]) -> None:
        """The driver is ready; ``notify`` interrupts it for a queue."""
        self._queues, self._notify = queues, notify
        self.kicked(TX)
        self.kicked(RX)

    def reset(self) -> None:
        """The driver is gone (a reboot, the end): so are all connections."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._queues, self._replies, self._starved, self.broken = [], deque(), [], None

    def kicked(self, index: int) -> None:
        """The driver has put something into a queue."""
        if not self._queues or self.broken is not None:
            return
        try:
            if index == TX:
                self._drain_tx()
            else:
                starved, self._starved = self._starved, []
                for connection in starved:
                    connection.waiting = False
                    self._watch(connection)
            self._flush_replies()
        except VirtqueueError as error:
            self.broken = error

    # ---- host-initiated connections ----

    def connect(
        self, port: int, host: socket.socket, *, on_open: Callable[[int], None], on_refused: Callable[[], None]
    ) -> None:
        """Dial a port of the guest; ``host`` becomes the connection's once open, and is closed with it."""
        host.setblocking(False)
        if not self._queues or self.broken is not None or len(self._connections) >= MAX_CONNECTIONS:
            on_refused()
            host.close()
            return
        host_port = self._free_port(port)
        connection = Connection((PARENT_CID, host_port, port), host)
        connection.on_open = lambda: on_open(host_port)
        connection.on_refused = on_refused
        self._connections[connection.key] = connection
        self._reply(connection, Op.REQUEST)
        self._flush()
        self._loop.after(CONNECT_TIMEOUT_S, lambda: self._timed_out(connection))

    def _free_port(self, guest_port: int) -> int:
        while True:
            port = self._next_port
            self._next_port = FIRST_HOST_PORT if port == LAST_HOST_PORT else port + 1
            if (PARENT_CID, port, guest_port) not in self._connections:
                return port

    def _timed_out(self, connection: Connection) -> None:
        if not connection.opened and self._connections.get(connection.key) is connection:
            self._reset(connection)
            self._flush()

    # ---- guest to host ----

    def _drain_tx(self) -> None:
        queue, count = self._queues[TX], 0
        try:
            # Bounded by the queue's size: a guest that refills it while we look gets its turn again.
            for _ in range(queue.available()):
                chain = queue.pop()
                if chain is None:
                    break
                self._take(chain.readable)
                queue.push(chain.head, 0)
                count += 1
        finally:
            if count:
                self._notify(TX)
        if queue.available():
            self._loop.call(lambda: self.kicked(TX))

    def _take(self, parts: list[memoryview]) -> None:
        """One packet, however its bytes are spread over descriptors; the header is copied before it is looked at."""
        if len(parts) == 1:
            whole = parts[0]
        elif len(parts) == 2 and len(parts[0]) == HEADER_SIZE:
            self._packet(Packet._make(HEADER.unpack(bytes(parts[0]))), parts[1])
            return
        else:
            whole = memoryview(b"".join(parts))
        if len(whole) < HEADER_SIZE:
            raise VirtqueueError(f"vsock packet: need {HEADER_SIZE} bytes of header, have {len(whole)}")
        self._packet(Packet._make(HEADER.unpack(bytes(whole[:HEADER_SIZE]))), whole[HEADER_SIZE:])

    def _packet(self, packet: Packet, payload: memoryview) -> None:  # noqa: PLR0912 - one case an operation
        if packet.len > len(payload) or packet.len > MAX_PAYLOAD:
            raise VirtqueueError(f"vsock packet: payload of {packet.len} bytes, have {len(payload)}")
        if packet.src_cid != self.guest_cid:
            return  # a CID of another's: not even an answer
        connection = self._connections.get((packet.dst_cid, packet.dst_port, packet.src_port))
        if connection is None:
            if packet.op == Op.REQUEST and packet.type == TYPE_STREAM:
                self._request(packet)
            elif packet.op != Op.RST:
                self._refuse(packet)
            return
        if packet.type != TYPE_STREAM:
            self._reset(connection)
            return
        connection.peer_buf_alloc, connection.peer_fwd_cnt = packet.buf_alloc, packet.fwd_cnt
        match packet.op:
            case Op.RW:
                self._data(connection, payload[: packet.len])
            case Op.CREDIT_UPDATE:
                self._watch(connection)
            case Op.CREDIT_REQUEST:
                self._reply(connection, Op.CREDIT_UPDATE)
            case Op.RESPONSE if not connection.opened:
                self._open(connection)
            case Op.SHUTDOWN:
                connection.guest_done |= Shutdown(packet.flags & 3)
                self._settle(connection)
            case Op.RST:
                self._drop(connection)
            case _:  # a second REQUEST, RESPONSE, or no operation at all
                self._reset(connection)

    def _request(self, packet: Packet) -> None:
        route = self._routes.get(packet.dst_cid)
        host = None
        if route is not None and len(self._connections) < MAX_CONNECTIONS:
            host = route.connect(packet.dst_port, packet.src_cid, packet.src_port)
        if host is None:
            self._refuse(packet)
            return
        connection = Connection((packet.dst_cid, packet.dst_port, packet.src_port), host)
        connection.peer_buf_alloc, connection.peer_fwd_cnt = packet.buf_alloc, packet.fwd_cnt
        self._connections[connection.key] = connection
        self._reply(connection, Op.RESPONSE)
        self._open(connection)

    def _open(self, connection: Connection) -> None:
        connection.opened = True
        if connection.on_open is not None:
            connection.on_open()
        connection.on_open = connection.on_refused = None
        self._watch(connection)

    def _data(self, connection: Connection, payload: memoryview) -> None:
        if not connection.opened or connection.guest_done & Shutdown.SEND:
            self._reset(connection)
            return
        if connection.pending_size + len(payload) > BUF_ALLOC:
            self._reset(connection)  # it had no credit for this
            return
        if not connection.pending:
            sent = self._send(connection, payload)
            if sent is None:
                return
            payload = payload[sent:]
        if len(payload):
            connection.pending.append(bytes(payload))
            connection.pending_size += len(payload)
            self._watch(connection)
        self._credit(connection)

    def _send(self, connection: Connection, data: memoryview | bytes) -> int | None:
        """Bytes that the host socket took; None when the host is gone, and with it the connection."""
        try:
            sent = connection.socket.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self._reset(connection)
            return None
        connection.fwd_cnt = (connection.fwd_cnt + sent) & U32
        return sent

    def _write_host(self, connection: Connection) -> None:
        while connection.pending:
            data = connection.pending[0]
            sent = self._send(connection, data)
            if sent is None:
                return
            connection.pending_size -= sent
            if sent < len(data):
                connection.pending[0] = data[sent:]
                break
            connection.pending.popleft()
        self._credit(connection)
        self._settle(connection)

    def _credit(self, connection: Connection) -> None:
        if (connection.fwd_cnt - connection.advertised) & U32 >= CREDIT_STEP:
            self._reply(connection, Op.CREDIT_UPDATE)

    # ---- host to guest ----

    def _ready(self, connection: Connection, events: int) -> None:
        try:
            if events & WRITE and connection.key in self._connections:
                self._write_host(connection)
            if events & READ and self._connections.get(connection.key) is connection:
                self._read_host(connection)
            self._flush_replies()
        except VirtqueueError as error:
            self.broken = error

    def _read_host(self, connection: Connection) -> None:
        """Move bytes from the host socket straight into RX buffers, as far as credit and buffers go."""
        queue, filled = self._queues[RX], 0
        try:
            for _ in range(BURST):
                credit = connection.credit()
                if not credit or self._replies:
                    break
                chain = queue.pop()
                if chain is None:
                    self._starve(connection)
                    break
                buffer, room = _rx_buffer(chain.writable)
                size = min(room, credit)
                try:
                    count = connection.socket.recv_into(buffer[HEADER_SIZE : HEADER_SIZE + size])
                except BlockingIOError:
                    queue.last_avail = (queue.last_avail - 1) & 0xFFFF  # not used: take it again next time
                    break
                except OSError:
                    queue.last_avail = (queue.last_avail - 1) & 0xFFFF
                    self._reset(connection)
                    return
                if not count:
                    queue.last_avail = (queue.last_avail - 1) & 0xFFFF
                    self._host_ended(connection)
                    return
                buffer[:HEADER_SIZE] = self._header(connection, Op.RW, length=count)
                connection.tx_cnt = (connection.tx_cnt + count) & U32
                _scatter(chain.writable, buffer, HEADER_SIZE + count)
                queue.push(chain.head, HEADER_SIZE + count)
                filled += 1
        finally:
            if filled:
                self._notify(RX)
        self._watch(connection)

    def _starve(self, connection: Connection) -> None:
        if not connection.waiting:
            connection.waiting = True
            self._starved.append(connection)

    def _host_ended(self, connection: Connection) -> None:
        """End of file from the host: we send no more, but go on receiving."""
        connection.host_done |= Shutdown.SEND
        self._reply(connection, Op.SHUTDOWN, flags=connection.host_done)
        self._settle(connection)

    # ---- ends ----

    def _settle(self, connection: Connection) -> None:
        """After a shutdown of either side, or when its last bytes went out: pass it on, or finish."""
        if self._connections.get(connection.key) is not connection:
            return
        if connection.guest_done & Shutdown.RECEIVE and not connection.host_done & Shutdown.SEND:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RD)
            connection.host_done |= Shutdown.SEND
        if connection.guest_done & Shutdown.SEND and not connection.pending:
            if connection.host_done & Shutdown.SEND:
                self._reset(connection)  # both halves are done: RST is how this protocol says so
                return
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)
        self._watch(connection)

    def _reset(self, connection: Connection) -> None:
        self._reply(connection, Op.RST)
        self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        if self._connections.get(connection.key) is connection:
            del self._connections[connection.key]
        self._loop.watch(connection.socket, 0, lambda _: None)
        connection.socket.close()
        refused, connection.on_refused = connection.on_refused, None
        if refused is not None:
            refused()

    # ---- replies ----

    def _watch(self, connection: Connection) -> None:
        """Wait for what this connection can make use of now."""
        if self._connections.get(connection.key) is not connection or not connection.opened:
            return
        events = 0
        if connection.pending:
            events |= WRITE
        if not connection.host_done & Shutdown.SEND and not connection.waiting and connection.credit():
            events |= READ
        self._loop.watch(connection.socket, events, lambda ready: self._ready(connection, ready))

    def _header(self, connection: Connection, op: Op, *, length: int = 0, flags: int = 0) -> bytes:
        connection.advertised = connection.fwd_cnt
        cid, port, guest_port = connection.key
        return HEADER.pack(
            cid, self.guest_cid, port, guest_port, length, TYPE_STREAM, op, flags, BUF_ALLOC, connection.fwd_cnt
        )

    def _reply(self, connection: Connection, op: Op, *, flags: int = 0) -> None:
        self._queue_reply(self._header(connection, op, flags=flags))

    def _refuse(self, packet: Packet) -> None:
        refusal = Packet(packet.dst_cid, packet.src_cid, packet.dst_port, packet.src_port, type=packet.type)
        self._queue_reply(refusal.pack())

    def _queue_reply(self, header: bytes) -> None:
        if len(self._replies) < MAX_REPLIES:
            self._replies.append(header)

    def _flush(self) -> None:
        try:
            self._flush_replies()
        except VirtqueueError as error:
            self.broken = error

    def _flush_replies(self) -> None:
        if not self._replies or not self._queues:
            return
        queue, filled = self._queues[RX], 0
        while self._replies:
            chain = queue.pop()
            if chain is None:
                break
            buffer, _ = _rx_buffer(chain.writable)
            buffer[:HEADER_SIZE] = self._replies.popleft()
            _scatter(chain.writable, buffer, HEADER_SIZE)
            queue.push(chain.head, HEADER_SIZE)
            filled += 1
        if filled:
            self._notify(RX)


def _rx_buffer(parts: list[memoryview]) -> tuple[memoryview, int]:
    """A buffer to fill, the RX buffer itself when it is in one piece, and the room for payload."""
    size = sum(len(part) for part in parts)
    if size < HEADER_SIZE:
        raise VirtqueueError(f"vsock RX buffer: {size} bytes, expected at least {HEADER_SIZE}")
    if len(parts) == 1:
        return parts[0], size - HEADER_SIZE
    return memoryview(bytearray(size)), size - HEADER_SIZE


def _scatter(parts: list[memoryview], buffer: memoryview, size: int) -> None:
    """Spread what was put into a buffer of ours over the guest's descriptors."""
    if len(parts) == 1:
        return
    offset = 0
    for part in parts:
        count = min(len(part), size - offset)
        part[:count] = buffer[offset : offset + count]
        offset += count
