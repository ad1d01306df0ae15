# SPDX-License-Identifier: Apache-2.0
"""A vsock device between a mock driver and streams, routes and timers that tests hold in their hands."""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence

from enclavekit.testing.virtio import MockVsockDriver, PacketLayout
from enclavekit.virtio.vsock import RX, TX, VsockDevice
from enclavekit.virtio.vsock_host import Outcome, Pending
from enclavekit.virtio.vsock_packet import Address, Header, Op

CID = 16
GUEST_PORT = 1024
HOST_PORT = 5000
UNDECIDED_PORT = 5001


class FakeStream:
    """A stream with what it gives and takes as plain bytes."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        """How much ``send`` takes."""
        self.sent = b""
        self.to_read = b""
        self.at_end = False
        self.gone = False
        self.ended = False
        self.refused = False
        self.closed = False
        self.on_event: Callable[[int], None] | None = None

    def attach(self, on_event: Callable[[int], None]) -> None:
        self.on_event = on_event

    def event(self, events: int) -> None:
        assert self.on_event is not None
        self.on_event(events)

    def give(self, data: bytes) -> None:
        """Something to read."""
        self.to_read += data
        self.event(select.EPOLLIN)

    def finish(self) -> None:
        """The host program ends its half."""
        self.at_end = True
        self.event(select.EPOLLIN | select.EPOLLRDHUP)

    def hang_up(self) -> None:
        """The host program closes."""
        self.at_end = self.gone = True
        self.event(select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLHUP)

    def make_room(self, room: int) -> None:
        self.room = room
        self.event(select.EPOLLOUT)

    def receive(self, buffers: Sequence[memoryview]) -> int | None:
        assert not self.closed
        total = 0
        for buffer in buffers:
            part, self.to_read = self.to_read[: len(buffer)], self.to_read[len(buffer) :]
            buffer[: len(part)] = part
            total += len(part)
        return total or (0 if self.at_end else None)

    def send(self, buffers: Sequence[memoryview | bytearray]) -> int:
        assert not self.closed
        if self.gone:
            raise BrokenPipeError
        data = b"".join(buffers)[: self.room]
        self.room -= len(data)
        self.sent += data
        return len(data)

    def end(self) -> None:
        self.ended = True

    def refuse(self) -> None:
        self.refused = True

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class FakeTimer:
    def __init__(self, delay_s: float, call: Callable[[], None]) -> None:
        self.delay_s = delay_s
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeRoute:
    """Accepts ``HOST_PORT``, and ``UNDECIDED_PORT`` when the test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[Address, int]] = []
        self.streams: list[FakeStream] = []
        self.pending: list[Pending] = []

    def dial(self, source: Address, port: int) -> FakeStream | Pending | None:
        self.calls.append((source, port))
        if port == UNDECIDED_PORT:
            self.streams.append(FakeStream())
            self.pending.append(Pending(self.streams[-1]))
            return self.pending[-1]
        if port != HOST_PORT:
            return None
        self.streams.append(FakeStream())
        return self.streams[-1]


class Rig:
    """A running device with guest ``CID``."""

    def __init__(self, *, layout: PacketLayout = PacketLayout.ONE, size: int = 64, slot: int = 4096) -> None:
        self.route = FakeRoute()
        self.timers: list[FakeTimer] = []
        self.outcomes: list[tuple[Outcome, int]] = []
        self.device = VsockDevice(CID, {2: self.route, 3: self.route}, self._call_later)
        self.guest = MockVsockDriver(bytearray(4 * size * slot), CID, size=size, slot=slot, layout=layout)
        self.start()
        self.guest.fill_rx()

    def _call_later(self, delay_s: float, call: Callable[[], None]) -> FakeTimer:
        self.timers.append(FakeTimer(delay_s, call))
        return self.timers[-1]

    def start(self) -> None:
        self.device.start(RX, self.guest.rx.for_device(self.guest.memory))
        self.device.start(TX, self.guest.tx.for_device(self.guest.memory))

    def work(self) -> None:
        for _ in range(1000):
            if not self.device.process():
                return
        raise AssertionError("the device never rests")

    def send(
        self, op: int, payload: bytes = b"", *, source: int = GUEST_PORT, destination: int = HOST_PORT, **fields: int
    ) -> None:
        self.guest.send(op, source, destination, payload, **fields)
        self.work()

    def receive(self) -> list[tuple[Header, bytes]]:
        self.work()
        packets = self.guest.receive()
        self.work()
        return packets

    def receive_ops(self) -> list[Op]:
        return [Op(header.op) for header, _ in self.receive()]

    def connect(self, source: int = GUEST_PORT, **fields: int) -> FakeStream:
        """The guest dials."""
        self.send(Op.REQUEST, b"", source=source, **fields)
        assert self.receive_ops() == [Op.RESPONSE]
        return self.route.streams[-1]

    def open(self, port: int = 7000) -> FakeStream:
        """The host dials."""
        stream = FakeStream()
        self.device.open(port, stream, 2.0, lambda outcome, host_port: self.outcomes.append((outcome, host_port)))
        return stream
