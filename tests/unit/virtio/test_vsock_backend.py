# SPDX-License-Identifier: Apache-2.0
"""The whole back-end over its true sockets: a mock front-end on one side, host programs on the other."""

from __future__ import annotations

import array
import gc
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from enclavekit.errors import EnclaveConnectionError, FileError, ProtocolError
from enclavekit.testing.vsock_guest import MockGuest
from enclavekit.virtio.backend import VsockBackend
from enclavekit.virtio.host_sockets import MAX_PATH, socket_path
from enclavekit.virtio.streams import HEARTBEAT
from enclavekit.virtio.vsock import BULK, TX
from enclavekit.virtio.vsock_packet import SHUTDOWN_BOTH, SHUTDOWN_SEND, Op

CID = 20
ID = "0123abcd"
TIMEOUT_S = 20.0


class Rig:
    def __init__(self, tmp_path: Path) -> None:
        self.directory, self.parent = tmp_path / "enclave", tmp_path / "parent"
        self.directory.mkdir()
        self.parent.mkdir()
        self.heartbeats = threading.Semaphore(0)
        self.failed = threading.Event()
        ours, self.transport = socket.socketpair()
        self.backend = VsockBackend(
            transport=ours,
            guest_cid=CID,
            enclave_id=ID,
            directory=self.directory,
            parent_directory=self.parent,
            on_heartbeat=self.heartbeats.release,
            on_failure=self.failed.set,
        )
        self.backend.start()
        self.guest = MockGuest(self.transport, CID)
        self.pool = ThreadPoolExecutor(4)

    def listen(self, path: Path) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.settimeout(TIMEOUT_S)
        listener.bind(str(path))
        listener.listen()
        return listener

    def dial_in(self, line: bytes) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(TIMEOUT_S)
        client.connect(str(self.directory / "vsock.sock"))
        client.sendall(line)
        return client

    def close(self) -> None:
        self.backend.close()
        self.pool.shutdown()
        self.guest.close()


def hung_up(client: socket.socket) -> bool:
    """Wait for the end, which a client that was not read from, or not accepted yet, sees as a reset."""
    try:
        return client.recv(100) == b""
    except ConnectionResetError:
        return True


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def test_the_guest_learns_its_cid(rig: Rig) -> None:
    assert rig.guest.config == CID.to_bytes(8, "little")


@pytest.mark.parametrize("cid", [2, 3])
def test_a_heartbeat_is_heard_and_answered(rig: Rig, cid: int) -> None:
    rig.guest.send(Op.REQUEST, 1024, 9000, cid=cid)
    rig.guest.expect(Op.RESPONSE)
    rig.guest.send(Op.RW, 1024, 9000, bytes([HEARTBEAT]), cid=cid)
    assert rig.guest.read(1) == b"\xb7"
    assert rig.guest.expect(Op.SHUTDOWN).flags == SHUTDOWN_BOTH
    assert rig.heartbeats.acquire(timeout=TIMEOUT_S)
    rig.guest.send(Op.RST, 1024, 9000, cid=cid)


@pytest.mark.parametrize("first", [b"\x00", b"\x00\xb7"])
def test_a_wrong_heartbeat_is_not_answered(rig: Rig, first: bytes) -> None:
    rig.guest.send(Op.REQUEST, 1024, 9000)
    rig.guest.expect(Op.RESPONSE)
    rig.guest.send(Op.RW, 1024, 9000, first)
    assert rig.guest.expect(Op.SHUTDOWN).flags == SHUTDOWN_BOTH
    assert not rig.heartbeats.acquire(blocking=False)


def test_a_heartbeat_that_never_comes(rig: Rig) -> None:
    rig.guest.send(Op.REQUEST, 1024, 9000)
    rig.guest.expect(Op.RESPONSE)
    rig.guest.send(Op.SHUTDOWN, 1024, 9000, flags=SHUTDOWN_SEND)
    rig.guest.expect(Op.SHUTDOWN)
    assert not rig.heartbeats.acquire(blocking=False)


def test_more_after_the_heartbeat_is_ignored(rig: Rig) -> None:
    rig.guest.send(Op.REQUEST, 1024, 9000)
    rig.guest.expect(Op.RESPONSE)
    rig.guest.send(Op.RW, 1024, 9000, b"\xb7\xb7more")
    assert rig.guest.read(1) == b"\xb7"
    assert rig.heartbeats.acquire(timeout=TIMEOUT_S)
    assert not rig.heartbeats.acquire(blocking=False)


def test_a_users_own_heartbeat_socket_comes_first(rig: Rig) -> None:
    with rig.listen(rig.directory / "vsock.sock_9000") as listener:
        rig.guest.send(Op.REQUEST, 1024, 9000)
        rig.guest.expect(Op.RESPONSE)
        client, _ = listener.accept()
        client.close()


def test_the_guest_dials_its_own_socket_first(rig: Rig) -> None:
    with rig.listen(rig.directory / "vsock.sock_5000") as own, rig.listen(rig.parent / "5000.sock"):
        rig.guest.send(Op.REQUEST, 1024, 5000)
        rig.guest.expect(Op.RESPONSE)
        client, address = own.accept()
        with client:
            client.settimeout(TIMEOUT_S)
            assert address == ""
            rig.guest.send(Op.RW, 1024, 5000, b"to the host")
            assert client.recv(100) == b"to the host"
            client.sendall(b"to the guest")
            assert rig.guest.read(12) == b"to the guest"


def test_a_shared_listener_is_told_who_calls(rig: Rig) -> None:
    with rig.listen(rig.parent / "5000.sock") as shared:
        rig.guest.send(Op.REQUEST, 1024, 5000)
        rig.guest.expect(Op.RESPONSE)
        client, address = shared.accept()
        client.close()
        assert address == b"\0enclavekit/0123abcd/20:1024"


def test_a_caller_whose_name_is_taken_goes_unnamed(rig: Rig) -> None:
    with rig.listen(rig.parent / "5000.sock") as shared, socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(b"\0enclavekit/0123abcd/20:1024")
        rig.guest.send(Op.REQUEST, 1024, 5000)
        rig.guest.expect(Op.RESPONSE)
        client, address = shared.accept()
        client.close()
        assert address == ""


def test_nobody_listens(rig: Rig) -> None:
    rig.listen(rig.directory / "vsock.sock_5000").close()  # a stale socket
    rig.guest.send(Op.REQUEST, 1024, 5000)
    rig.guest.expect(Op.RST)


def test_connect_from_this_process(rig: Rig) -> None:
    answer = rig.pool.submit(rig.backend.connect, 7000)
    host_port = rig.guest.accept(7000)
    with answer.result(TIMEOUT_S) as connected:
        connected.settimeout(TIMEOUT_S)
        connected.sendall(b"hello")
        assert rig.guest.read(5) == b"hello"
        rig.guest.send(Op.RW, 7000, host_port, b"you")
        assert connected.recv(10) == b"you"
        connected.shutdown(socket.SHUT_WR)
        assert rig.guest.expect(Op.SHUTDOWN).flags == SHUTDOWN_SEND
        rig.guest.send(Op.RW, 7000, host_port, b"still")
        assert connected.recv(10) == b"still"
        rig.guest.send(Op.SHUTDOWN, 7000, host_port, flags=SHUTDOWN_BOTH)
        rig.guest.expect(Op.RST)
        assert connected.recv(10) == b""


def test_connect_is_refused(rig: Rig) -> None:
    answer = rig.pool.submit(rig.backend.connect, 7000)
    header = rig.guest.expect(Op.REQUEST)
    rig.guest.send(Op.RST, 7000, header.src_port)
    with pytest.raises(EnclaveConnectionError) as caught:
        answer.result(TIMEOUT_S)
    assert str(caught.value) == "port 7000 of CID 20: connection refused"
    assert caught.value.hint == "does a program listen there?"


def test_connect_is_not_answered(rig: Rig) -> None:
    with pytest.raises(EnclaveConnectionError) as caught:
        rig.backend.connect(7000, timeout_s=0.01)
    assert str(caught.value) == "port 7000 of CID 20: no answer within 0.01 s"


def test_connect_after_the_end(rig: Rig) -> None:
    rig.backend.close()
    with pytest.raises(EnclaveConnectionError) as caught:
        rig.backend.connect(7000)
    assert str(caught.value) == "port 7000 of CID 20: the enclave has ended"


def test_connect_while_the_enclave_ends(rig: Rig) -> None:
    answer = rig.pool.submit(rig.backend.connect, 7000, TIMEOUT_S)
    rig.guest.expect(Op.REQUEST)
    rig.transport.shutdown(socket.SHUT_RDWR)
    with pytest.raises(EnclaveConnectionError, match=r"^port 7000 of CID 20: the enclave has ended$"):
        answer.result(TIMEOUT_S)
    with pytest.raises(EnclaveConnectionError, match=r"^port 7000 of CID 20: the enclave has ended$"):
        rig.backend.connect(7000)
    assert rig.backend.error is None


@pytest.mark.parametrize("port", [-1, 0xFFFFFFFF])
def test_connect_to_what_is_no_port(rig: Rig, port: int) -> None:
    with pytest.raises(ValueError, match=f"^port {port} is not within 0 to 4294967294$"):
        rig.backend.connect(port)


@pytest.mark.parametrize("line", [b"CONNECT 7000\n", b"connect 7000\r\n"])
def test_a_host_program_dials_in_and_may_speak_early(rig: Rig, line: bytes) -> None:
    with rig.dial_in(line + b"early") as client:
        host_port = rig.guest.accept(7000)
        assert client.recv(100) == b"OK %d\n" % host_port
        assert rig.guest.read(5) == b"early"
        rig.guest.send(Op.RW, 7000, host_port, b"hi")
        assert client.recv(100) == b"hi"


def test_a_line_may_come_in_pieces(rig: Rig) -> None:
    with rig.dial_in(b"CONN") as client:
        client.sendall(b"ECT 70")
        client.sendall(b"00\n")
        host_port = rig.guest.accept(7000)
        assert client.recv(100) == b"OK %d\n" % host_port


@pytest.mark.parametrize(
    "line", [b"HELLO\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967295\n", b"CONNECT -1\n", b"x" * 32, b"\n"]
)
def test_a_wrong_line_is_hung_up_on(rig: Rig, line: bytes) -> None:
    with rig.dial_in(line) as client:
        assert hung_up(client)


def test_a_client_that_leaves_before_its_line_ends(rig: Rig) -> None:
    with rig.dial_in(b"CONNECT 70") as client:
        client.shutdown(socket.SHUT_WR)
    with rig.dial_in(b"CONNECT 7000\n"):
        rig.guest.accept(7000)


def test_a_refused_client_is_hung_up_on(rig: Rig) -> None:
    with rig.dial_in(b"CONNECT 7000\n") as client:
        header = rig.guest.expect(Op.REQUEST)
        rig.guest.send(Op.RST, 7000, header.src_port)
        assert client.recv(100) == b""


def test_a_conversation_goes_on_without_kicks(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enclavekit.virtio.loop.LOOK_S", TIMEOUT_S)
    with rig.listen(rig.directory / "vsock.sock_5000") as listener:
        rig.guest.send(Op.REQUEST, 1024, 5000)
        rig.guest.expect(Op.RESPONSE)
        client, _ = listener.accept()
        with client:
            client.settimeout(TIMEOUT_S)
            rig.guest.send(Op.RW, 1024, 5000, b"who are you?")
            assert client.recv(100) == b"who are you?"
            rig.guest.driver.send(Op.RW, 1024, 5000, b"where?")  # not another word of it
            assert client.recv(100) == b"where?"
            client.sendall(b"here")
            assert rig.guest.read(4) == b"here"
            rig.guest.driver.send(Op.CREDIT_UPDATE, 1024, 5000)
            rig.guest.driver.send(Op.RW, 1024, 5000, b"thanks")
            assert client.recv(100) == b"thanks"


def test_after_much_data_the_guest_is_to_kick(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enclavekit.virtio.loop.LOOK_S", TIMEOUT_S)
    with rig.listen(rig.directory / "vsock.sock_5000") as listener:
        rig.guest.send(Op.REQUEST, 1024, 5000)
        rig.guest.expect(Op.RESPONSE)
        client, _ = listener.accept()
        with client:
            client.settimeout(TIMEOUT_S)
            for _ in range(4):
                rig.guest.driver.send(Op.RW, 1024, 5000, bytes(BULK // 4))
            rig.guest.front.kick(TX)
            assert client.recv(BULK, socket.MSG_WAITALL) == bytes(BULK)
            rig.guest.front.wait(TX)
            assert rig.guest.driver.tx.wants_kicks()


def test_bulk_data_survives_a_slow_reader(rig: Rig) -> None:
    """Three megabytes: credit holds the guest back, nothing is lost."""
    data = os.urandom(3000)
    with rig.listen(rig.directory / "vsock.sock_5000") as listener:
        rig.guest.send(Op.REQUEST, 1024, 5000)
        header = rig.guest.expect(Op.RESPONSE)
        client, _ = listener.accept()
        with client:
            client.settimeout(TIMEOUT_S)

            def read() -> bytes:
                got = b""
                while block := client.recv(100_000):
                    got += block
                return got

            sent = 0
            for number in range(1000):
                if number == 87:  # until here nobody reads: the socket is full, we buffer
                    reader = rig.pool.submit(read)
                while sent + len(data) - header.fwd_cnt > header.buf_alloc:
                    header, _ = rig.guest.receive()
                while rig.guest.driver.tx.used_index != number + 1 & 0xFFFF:
                    rig.guest.front.wait(TX)
                rig.guest.send(Op.RW, 1024, 5000, data)
                sent += len(data)
            rig.guest.send(Op.SHUTDOWN, 1024, 5000, flags=SHUTDOWN_BOTH)
            assert reader.result(TIMEOUT_S) == data * 1000


def test_the_guest_boots_again(rig: Rig) -> None:
    for _ in range(2):
        answer = rig.pool.submit(rig.backend.connect, 7000)
        rig.guest.accept(7000)
        with answer.result(TIMEOUT_S) as connected:
            connected.settimeout(TIMEOUT_S)
            rig.guest.front.stop(2)
            assert connected.recv(1) == b""
            rig.guest.boot()


def test_the_front_end_leaves(rig: Rig) -> None:
    with rig.dial_in(b"") as waiting:
        rig.transport.shutdown(socket.SHUT_RDWR)
        assert hung_up(waiting)
    assert not (rig.directory / "vsock.sock").exists()
    assert rig.backend.error is None
    assert not rig.failed.is_set()


def test_a_front_end_that_breaks_the_protocol_ends_the_device_loudly(rig: Rig) -> None:
    rig.guest.front.send(99)
    assert rig.failed.wait(TIMEOUT_S)
    assert isinstance(rig.backend.error, ProtocolError)
    assert str(rig.backend.error) == "vhost-user: request 99 was not offered"
    assert not (rig.directory / "vsock.sock").exists()


def test_a_driver_that_cannot_be_signalled_ends_the_device_loudly(rig: Rig) -> None:
    def broken() -> None:
        raise ProtocolError("no word reaches the driver")

    queue = rig.backend._device._tx
    assert queue is not None
    queue._interrupt = broken
    rig.guest.send(Op.CREDIT_UPDATE, 1024, 5000)
    assert rig.failed.wait(TIMEOUT_S)
    assert str(rig.backend.error) == "no word reaches the driver"
    assert not (rig.directory / "vsock.sock").exists()


def test_a_guest_that_breaks_its_queue_is_reported_until_it_boots_again(rig: Rig) -> None:
    rig.guest.driver.send_raw(b"short")
    rig.guest.front.kick(TX)
    rig.guest.front.sync()
    rig.guest.front.stop(2)
    assert str(rig.backend.error) == "tx queue: packet of 5 bytes, a header has 44"
    rig.guest.boot()
    assert rig.backend.error is None
    assert not rig.failed.is_set()


def test_nothing_is_left_open(tmp_path: Path) -> None:
    def open_fds() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before, threads = open_fds(), threading.active_count()
    rig = Rig(tmp_path)
    for _ in range(3):
        answer = rig.pool.submit(rig.backend.connect, 7000)
        rig.guest.accept(7000)
        answer.result(TIMEOUT_S).close()
        rig.guest.expect(Op.SHUTDOWN)
    rig.dial_in(b"CONN").close()
    rig.close()
    del rig
    assert open_fds() == before
    assert threading.active_count() == threads
    assert list((tmp_path / "enclave").iterdir()) == []


def test_a_backend_that_never_started_closes_all() -> None:
    ours, theirs = socket.socketpair()
    backend = VsockBackend(
        transport=ours, guest_cid=CID, enclave_id=ID, directory=Path("/nowhere"), parent_directory=None
    )
    backend.close()
    theirs.settimeout(TIMEOUT_S)
    assert theirs.recv(1) == b""
    theirs.close()


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    directory = tmp_path / "missing"
    backend = VsockBackend(transport=ours, guest_cid=CID, enclave_id=ID, directory=directory, parent_directory=None)
    with pytest.raises(FileError) as caught:
        backend.start()
    assert str(caught.value) == f"cannot listen on {directory}/vsock.sock: no such file or directory"
    backend.close()
    theirs.close()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        (tmp_path / "enclave").mkdir()
        stale.bind(str(tmp_path / "enclave" / "vsock.sock"))
    (tmp_path / "enclave").rename(tmp_path / "old")
    rig = Rig(tmp_path)
    rig.backend.close()
    (tmp_path / "old" / "vsock.sock").rename(rig.directory / "vsock.sock")
    ours, theirs = socket.socketpair()
    backend = VsockBackend(transport=ours, guest_cid=CID, enclave_id=ID, directory=rig.directory, parent_directory=None)
    backend.start()
    rig.dial_in(b"").close()
    backend.close()
    theirs.close()
    rig.close()


def test_paths_of_any_length(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    rig = Rig(deep)
    path = rig.directory / "vsock.sock"
    assert len(str(path)) > MAX_PATH
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        with socket_path(rig.parent, "5000.sock") as short:
            listener.bind(short)
        listener.listen()
        listener.settimeout(TIMEOUT_S)
        rig.guest.send(Op.REQUEST, 1024, 5000)
        rig.guest.expect(Op.RESPONSE)
        listener.accept()[0].close()
        assert rig.guest.expect(Op.SHUTDOWN)
        with socket_path(rig.directory, "vsock.sock") as short:
            client.connect(short)
        client.sendall(b"CONNECT 7000\n")
        rig.guest.accept(7000)
    rig.close()


@pytest.mark.parametrize(("length", "direct"), [(MAX_PATH, True), (MAX_PATH + 1, False)])
def test_a_path_is_taken_as_it_is_while_it_fits(tmp_path: Path, length: int, direct: bool) -> None:
    name = "n" * (length - len(str(tmp_path)) - 1)
    with socket_path(tmp_path, name) as path, socket.socket(socket.AF_UNIX) as listener:
        assert (path == str(tmp_path / name)) is direct
        listener.bind(path)
    assert (tmp_path / name).is_socket()


def test_file_descriptors_sent_along_the_transport_are_closed_at_the_end(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    read_end, write_end = os.pipe()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write_end]))]
    rig.transport.sendmsg([b"\3\0\0\0"], ancillary)  # a third of a header
    os.close(write_end)
    rig.close()
    assert os.read(read_end, 1) == b""
    os.close(read_end)
