# SPDX-License-Identifier: Apache-2.0
"""The vsock switch over its true devices and threads: a parent, enclaves, and who reaches whom."""

from __future__ import annotations

import gc
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from enclavekit.errors import EnclaveConnectionError, EnclaveRefusedError
from enclavekit.lab.switch import CONSOLE_PORTS, Switch
from enclavekit.testing.vsock_guest import TIMEOUT_S, MockGuest
from enclavekit.virtio.backend import VsockBackend
from enclavekit.virtio.vsock_connection import BUF_ALLOC
from enclavekit.virtio.vsock_packet import PARENT_CID, SHUTDOWN_BOTH, SHUTDOWN_SEND, Address, Header, Op

FIRST, SECOND = 16, 17
PORT = 9000
MAX_CONNECTIONS = 5
"""Of an enclave."""
KERNEL_BUFFERS = 1 << 20
"""More than a socket pair holds in both of its buffers."""


class Rig:
    """A parent and two enclaves."""

    def __init__(self) -> None:
        self.switch = Switch(MAX_CONNECTIONS)
        self.failed = threading.Event()
        ours, theirs = socket.socketpair()
        self.switch.start_parent(ours, self.failed.set)
        self.parent = MockGuest(theirs, PARENT_CID)
        self.backends: dict[int, VsockBackend] = {}
        self.guests: dict[int, MockGuest] = {}
        for cid in (FIRST, SECOND):
            ours, theirs = socket.socketpair()
            self.backends[cid] = VsockBackend(
                transport=ours,
                guest_cid=cid,
                enclave_id=str(cid),
                directory=Path(),
                parent_directory=None,
                network=self.switch,
            )
            self.backends[cid].start()
            self.guests[cid] = MockGuest(theirs, cid)
        self.first, self.second = self.guests[FIRST], self.guests[SECOND]

    def connected(self, port: int = PORT, source: int = 1024) -> None:
        """The first enclave and the parent, which listens at ``port``."""
        self.first.send(Op.REQUEST, source, port)
        assert self.parent.accept(port, cid=FIRST) == source
        self.first.expect(Op.RESPONSE)

    def close(self) -> None:
        for backend in self.backends.values():
            backend.close()
        self.switch.close()
        for guest in (self.parent, *self.guests.values()):
            guest.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()
    assert not rig.failed.is_set()


def test_the_parent_sees_which_enclave_and_port_calls_and_both_talk(rig: Rig) -> None:
    rig.connected()
    rig.first.send(Op.RW, 1024, PORT, b"\xb7")
    assert rig.parent.read(1) == b"\xb7"
    rig.parent.send(Op.RW, PORT, 1024, b"answer", cid=FIRST)
    assert rig.first.read(6) == b"answer"


def test_the_heartbeat_is_nobodys_but_the_parents(rig: Rig) -> None:
    rig.first.send(Op.REQUEST, 1024, 9000)
    header = rig.parent.expect(Op.REQUEST)
    assert (header.src_cid, header.src_port, header.dst_port) == (FIRST, 1024, 9000)
    rig.parent.send(Op.RST, 9000, 1024, cid=FIRST)
    assert rig.first.expect(Op.RST) == Header(3, FIRST, 9000, 1024, 0, 1, Op.RST, 0, BUF_ALLOC, 0)


@pytest.mark.parametrize("cid", [FIRST, SECOND])
def test_the_parent_reaches_each_enclave_by_its_cid(rig: Rig, cid: int) -> None:
    guest = rig.guests[cid]
    rig.parent.send(Op.REQUEST, 2000, 5000, cid=cid)
    assert guest.accept(5000) == 2000
    rig.parent.expect(Op.RESPONSE)
    guest.send(Op.RW, 5000, 2000, b"from inside")
    assert rig.parent.read(11) == b"from inside"


@pytest.mark.parametrize("cid", [0, 1, 2, FIRST, SECOND, 18, 0xFFFFFFFF, 1 << 40])
def test_an_enclave_reaches_only_the_parent(rig: Rig, cid: int) -> None:
    rig.first.send(Op.REQUEST, 1024, 5000, cid=cid)
    assert rig.first.expect(Op.RST).src_cid == cid
    rig.second.send(Op.REQUEST, 1, 1)  # what comes to it first is the answer to this
    rig.parent.expect(Op.REQUEST)


@pytest.mark.parametrize("cid", [0, 1, 2, PARENT_CID, 18, 0xFFFFFFFF])
def test_the_parent_reaches_nobody_else(rig: Rig, cid: int) -> None:
    rig.parent.send(Op.REQUEST, 1024, 5000, cid=cid)
    assert rig.parent.expect(Op.RST).src_cid == cid


def test_an_enclave_does_not_pass_for_another(rig: Rig) -> None:
    rig.first.driver.send_raw(bytes(Header(SECOND, 3, 1024, PORT, 0, 1, Op.REQUEST, 0, 1 << 18, 0)))
    rig.first.send(Op.REQUEST, 1025, PORT)
    assert rig.parent.expect(Op.REQUEST).src_port == 1025


def test_halves_end_one_after_the_other(rig: Rig) -> None:
    rig.connected()
    rig.first.send(Op.RW, 1024, PORT, b"question")
    rig.first.send(Op.SHUTDOWN, 1024, PORT, flags=SHUTDOWN_SEND)
    assert rig.parent.read(8) == b"question"
    assert rig.parent.expect(Op.SHUTDOWN).flags == SHUTDOWN_SEND
    rig.parent.send(Op.RW, PORT, 1024, b"answer", cid=FIRST)
    assert rig.first.read(6) == b"answer"
    rig.parent.send(Op.SHUTDOWN, PORT, 1024, cid=FIRST, flags=SHUTDOWN_BOTH)
    rig.parent.expect(Op.RST)  # confirms
    assert rig.first.expect(Op.SHUTDOWN).flags & SHUTDOWN_SEND


def test_who_is_not_read_from_stops_and_nothing_is_lost(rig: Rig) -> None:
    """The parent gives no credit; the enclave may send what two devices and a socket pair hold, and not more."""
    rig.first.send(Op.REQUEST, 1024, PORT)
    header = rig.parent.expect(Op.REQUEST)
    rig.parent.send(Op.RESPONSE, PORT, 1024, cid=FIRST, buf_alloc=0)
    credit = rig.first.expect(Op.RESPONSE)
    piece = bytes(range(256)) * 14
    sent = consumed = 0
    while sent - consumed + len(piece) <= credit.buf_alloc:
        rig.first.send(Op.RW, 1024, PORT, piece)
        sent += len(piece)
        if sent - consumed + len(piece) > credit.buf_alloc:
            rig.first.send(Op.CREDIT_REQUEST, 1024, PORT)
            while (told := rig.first.expect(Op.CREDIT_UPDATE)).fwd_cnt < consumed:
                pass
            consumed = told.fwd_cnt
    assert sent <= BUF_ALLOC + KERNEL_BUFFERS
    # Now it reads, bit by bit.
    got, allowance = b"", 0
    while len(got) < sent:
        allowance += 1 << 15
        rig.parent.send(Op.CREDIT_UPDATE, PORT, 1024, cid=FIRST, buf_alloc=1 << 15, fwd_cnt=len(got))
        want = min(1 << 15, sent - len(got))
        got += rig.parent.read(want)
    assert got == piece * (sent // len(piece))
    assert header.src_cid == FIRST


def test_an_enclave_that_dies_ends_its_connections(rig: Rig) -> None:
    rig.connected()
    rig.backends[FIRST].close()
    assert rig.parent.expect(Op.SHUTDOWN).flags == SHUTDOWN_BOTH
    rig.parent.send(Op.REQUEST, 2000, 5000, cid=FIRST)
    assert rig.parent.expect(Op.RST).src_cid == FIRST


def test_a_parent_that_is_reset_ends_everybodys_connections(rig: Rig) -> None:
    rig.connected()
    rig.parent.front.stop(2)
    assert rig.first.expect(Op.SHUTDOWN).flags == SHUTDOWN_BOTH
    rig.parent.boot()
    rig.first.send(Op.REQUEST, 1025, PORT)
    assert rig.parent.accept(PORT, cid=FIRST) == 1025
    rig.first.expect(Op.RESPONSE)


def test_an_enclave_that_dies_before_it_answers_refuses(rig: Rig) -> None:
    rig.parent.send(Op.REQUEST, 2000, 5000, cid=FIRST)
    rig.first.expect(Op.REQUEST)
    rig.backends[FIRST].close()
    rig.parent.expect(Op.RST)


def test_a_caller_that_is_reset_before_the_answer_leaves_nothing(rig: Rig) -> None:
    rig.parent.send(Op.REQUEST, 2000, 5000, cid=FIRST)
    source = rig.first.expect(Op.REQUEST).src_port
    rig.parent.front.stop(2)
    rig.first.send(Op.RESPONSE, 5000, source)
    assert rig.first.expect(Op.SHUTDOWN).flags == SHUTDOWN_BOTH


def test_we_reach_the_parents_ports_from_cid_0(rig: Rig) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(rig.switch.connect, 52, TIMEOUT_S)
        source = rig.parent.accept(52, cid=0)
        with waiting.result(TIMEOUT_S) as made:
            made.sendall(b"hello")
            assert rig.parent.read(5) == b"hello"
            rig.parent.send(Op.RW, 52, source, b"you", cid=0)
            assert made.recv(3) == b"you"


def test_a_port_of_the_parents_where_nobody_listens(rig: Rig) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(rig.switch.connect, 52, TIMEOUT_S)
        source = rig.parent.expect(Op.REQUEST).src_port
        rig.parent.send(Op.RST, 52, source, cid=0)
        with pytest.raises(EnclaveRefusedError, match=r"^port 52 of CID 3: connection refused$"):
            waiting.result(TIMEOUT_S)


def test_a_parent_that_is_gone_is_not_reached(rig: Rig) -> None:
    rig.switch.close()
    with pytest.raises(EnclaveConnectionError):
        rig.switch.connect(52)


def test_a_console_is_read_by_the_parent_at_port_10000_and_the_cid(rig: Rig) -> None:
    attached: list[socket.socket] = []
    rig.switch.offer_console(FIRST, attached.append)
    rig.parent.send(Op.REQUEST, 1024, CONSOLE_PORTS + FIRST, cid=0)
    rig.parent.expect(Op.RESPONSE)
    attached[0].sendall(b"Linux version")
    assert rig.parent.read(13) == b"Linux version"
    attached[0].close()
    assert rig.parent.expect(Op.SHUTDOWN).flags & SHUTDOWN_SEND
    rig.switch.withdraw_console(FIRST)
    rig.parent.send(Op.REQUEST, 1025, CONSOLE_PORTS + FIRST, cid=0)
    rig.parent.expect(Op.RST)


@pytest.mark.parametrize("cid", [0, PARENT_CID])
def test_consoles_are_not_for_enclaves(rig: Rig, cid: int) -> None:
    rig.switch.offer_console(SECOND, lambda end: end.close())
    rig.first.send(Op.REQUEST, 1024, CONSOLE_PORTS + SECOND, cid=cid)
    if cid == PARENT_CID:  # where that is an ordinary port
        rig.parent.send(Op.RST, CONSOLE_PORTS + SECOND, rig.parent.expect(Op.REQUEST).src_port, cid=FIRST)
    rig.first.expect(Op.RST)


def test_a_cid_is_one_guests(rig: Rig) -> None:
    ours, theirs = socket.socketpair()
    second = VsockBackend(
        transport=ours,
        guest_cid=FIRST,
        enclave_id="second",
        directory=Path(),
        parent_directory=None,
        network=rig.switch,
    )
    with pytest.raises(ValueError, match=r"^CID 16 is taken$"):
        second.start()
    second.close()
    theirs.close()
    rig.connected()  # the first one is still there


def test_an_enclave_with_very_many_connections_is_alone_in_having_no_more(rig: Rig) -> None:
    for source in range(1024, 1024 + MAX_CONNECTIONS):
        rig.connected(source=source)
    rig.first.send(Op.REQUEST, 2000, PORT)
    rig.first.expect(Op.RST)
    rig.parent.send(Op.REQUEST, 2000, 5000, cid=FIRST)
    rig.parent.expect(Op.RST)
    rig.second.send(Op.REQUEST, 2000, PORT)
    rig.parent.accept(PORT, cid=SECOND)
    rig.second.expect(Op.RESPONSE)


def test_nothing_stays_open() -> None:
    def descriptors() -> list[str]:
        gc.collect()  # mappings of guest memory go with their last view
        return sorted(str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    Rig().close()
    before = descriptors()
    rig = Rig()
    rig.connected()
    rig.parent.send(Op.REQUEST, 2000, 5000, cid=SECOND)
    rig.second.expect(Op.REQUEST)  # and no answer
    rig.close()
    del rig
    assert descriptors() == before


def test_addresses_are_told_apart(rig: Rig) -> None:
    """The same ports in both directions are the same connection, which exists once."""
    rig.connected(port=5000, source=6000)
    rig.parent.send(Op.REQUEST, 5000, 6001, cid=FIRST)
    header = rig.first.expect(Op.REQUEST)
    assert Address(header.src_cid, header.src_port) == Address(PARENT_CID, 5000)
