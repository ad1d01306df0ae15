# SPDX-License-Identifier: Apache-2.0
"""A guest behind a whole vsock back-end, for tests: its driver, and a QEMU's side of vhost-user, packet by packet."""

from __future__ import annotations

import socket

from enclavekit.testing.vhost_user import MockFrontEnd
from enclavekit.testing.virtio import MockVsockDriver
from enclavekit.virtio.vsock import RX, TX
from enclavekit.virtio.vsock_packet import PARENT_CID, Header, Op

TIMEOUT_S = 20.0


class MockGuest:
    """The guest ``cid``, which takes packets one by one, waiting for them."""

    def __init__(self, transport: socket.socket, cid: int) -> None:
        transport.settimeout(TIMEOUT_S)
        self.cid = cid
        self.front = MockFrontEnd(transport, 1 << 20)
        self.config = self.front.handshake()
        self.boot()

    def boot(self) -> None:
        """Its driver starts."""
        self.driver = MockVsockDriver(self.front.memory, self.cid, size=64)
        self._packets: list[tuple[Header, bytes]] = []
        self.front.start([self.driver.rx, self.driver.tx])
        self.driver.fill_rx()
        self.front.kick(RX)

    def send(self, op: int, source: int, destination: int, payload: bytes = b"", **fields: int) -> None:
        """One packet, once there is room for it."""
        while True:
            try:
                self.driver.send(op, source, destination, payload, **fields)
                break
            except ValueError:  # all buffers are with the device
                self.front.wait(TX)
        self.front.kick(TX)

    def receive(self) -> tuple[Header, bytes]:
        """The next packet."""
        while not self._packets:
            self.front.wait(RX)
            self._packets = self.driver.receive()
            self.front.kick(RX)
        return self._packets.pop(0)

    def expect(self, op: Op) -> Header:
        """The next packet, which has to be for this."""
        header, _ = self.receive()
        if header.op != op:
            raise AssertionError(f"got {header}, expected {op.name}")
        return header

    def read(self, count: int) -> bytes:
        """Payload, until there is as much."""
        data = b""
        while len(data) < count:
            header, payload = self.receive()
            if header.op != Op.RW:
                raise AssertionError(f"got {header} after {len(data)} bytes of {count}")
            data += payload
        if len(data) != count:
            raise AssertionError(f"got {len(data)} bytes, expected {count}")
        return data

    def accept(self, port: int, *, cid: int = PARENT_CID) -> int:
        """Answer a request from ``cid``; returns its port."""
        header = self.expect(Op.REQUEST)
        if (header.src_cid, header.dst_port) != (cid, port):
            raise AssertionError(f"got {header}, expected CID {cid} to want port {port}")
        self.send(Op.RESPONSE, port, header.src_port, cid=cid)
        return header.src_port

    def close(self) -> None:
        """It is gone."""
        self.front.close()
