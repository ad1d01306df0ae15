# SPDX-License-Identifier: Apache-2.0
"""vsock between a real guest and host sockets: both directions, half-close, much data, who called."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Enclave, stop

PATTERN = bytes(range(251))


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.parent.parent.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(60)
        yield listener


def answer(listener: socket.socket, seen: list[bytes], names: list[object]) -> None:
    """Read all, then answer: the half that the guest closed must leave the other usable."""
    connection, name = listener.accept()
    names.append(name)
    with connection:
        data = b""
        while part := connection.recv(65536):
            data += part
        seen.append(data)
        connection.sendall(data[::-1] if len(data) < 100 else data)


@pytest.fixture
def answering(enclave: Enclave) -> Iterator[tuple[list[bytes], list[object]]]:
    """A host program at port 5000 of the parent, that every enclave can dial."""
    seen: list[bytes] = []
    names: list[object] = []
    enclave.directory.mkdir(mode=0o700)
    with listening(enclave.directory / "parent" / "5000.sock") as listener:
        thread = threading.Thread(target=answer, args=(listener, seen, names))
        thread.start()
        yield seen, names
        thread.join(60)


def test_the_enclave_dials_the_parent(
    enclave: Enclave, rootfs: Path, answering: tuple[list[bytes], list[object]]
) -> None:
    done = enclave("run", f"dir:{rootfs}", "--logs", "--", "vsock", "dial", "5000", "stressed")
    assert (done.returncode, done.stdout) == (0, "desserts"), done.stderr
    seen, names = answering
    assert seen == [b"stressed"]
    (name,) = names
    assert isinstance(name, bytes)
    assert name.startswith(b"\0enclavekit/")
    assert b"/16:" in name


def test_much_data_both_ways(enclave: Enclave, rootfs: Path, answering: tuple[list[bytes], list[object]]) -> None:
    size = 8 << 20
    done = enclave("run", f"dir:{rootfs}", "--logs", "--", "vsock", "blast", "5000", str(size))
    assert (done.returncode, done.stdout) == (0, f"{size} bytes came back\n"), done.stderr
    (data,) = answering[0]
    assert data == (PATTERN * (size // 251 + 1))[:size]


@pytest.mark.parametrize("buffer", [100_000, 4096])
def test_much_data_both_ways_of_a_program_with_small_buffers(
    enclave: Enclave, rootfs: Path, answering: tuple[list[bytes], list[object]], buffer: int
) -> None:
    """Linux has no more under way than it could buffer itself, and goes on when it hears that this much was read."""
    size = 1 << 20
    command = ("vsock", "blast", "5000", str(size), str(buffer))
    done = enclave("run", f"dir:{rootfs}", "--logs", "--timeout", "60", "--", *command)
    assert (done.returncode, done.stdout) == (0, f"{size} bytes came back\n"), done.stderr
    assert answering[0] == [(PATTERN * (size // 251 + 1))[:size]]


def test_a_port_where_nobody_listens_is_refused_at_once(enclave: Enclave, rootfs: Path) -> None:
    done = enclave("run", f"dir:{rootfs}", "--logs", "--", "vsock", "dial", "5001", "x")
    assert done.returncode == 1
    assert "connect: Connection reset by peer" in done.stdout


def test_the_host_dials_the_enclave(enclave: Enclave, rootfs: Path) -> None:
    process = enclave.start("run", f"dir:{rootfs}", "--logs", "--", "vsock", "echo", "7000")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        (name,) = enclave.left()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(enclave.directory / name / "vsock.sock"))
            # Data behind the line, before the answer to it, must not get lost.
            client.sendall(b"CONNECT 7000\nhello ")
            client.sendall(b"enclave")
            client.shutdown(socket.SHUT_WR)
            received = b""
            while part := client.recv(100):
                received += part
        line, _, data = received.partition(b"\n")
        assert line.startswith(b"OK ")
        assert data == b"hello enclave"
        assert process.stdout.readline() == b"peer 3\n"
        assert process.wait(30) == 0
    finally:
        stop(process)


def hung_up(client: socket.socket) -> bool:
    """The end of the connection; a reset where our line was not even read."""
    try:
        return client.recv(100) == b""
    except ConnectionResetError:
        return True


def test_a_host_that_dials_a_closed_port_is_hung_up_on(enclave: Enclave, rootfs: Path) -> None:
    process = enclave.start("run", f"dir:{rootfs}", "--logs", "--", "sh", "-c", "echo ready; sleep 5")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        (name,) = enclave.left()
        for line in (b"CONNECT 7001\n", b"nonsense\n", b"CONNECT 99999999999\n"):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(30)
                client.connect(str(enclave.directory / name / "vsock.sock"))
                client.sendall(line)
                assert hung_up(client), line
        assert process.wait(60) == 0
    finally:
        stop(process)


def test_an_own_listener_of_this_enclave_comes_first(enclave: Enclave, rootfs: Path) -> None:
    """``vsock.sock_<port>`` is made while the enclave runs; the guest dials when it is told to."""
    process: subprocess.Popen[bytes] = enclave.start(
        "run", f"dir:{rootfs}", "--logs", "--", "sh", "-c", "vsock echo 7000; vsock dial 5002 mine"
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        (name,) = enclave.left()
        seen: list[bytes] = []
        with listening(enclave.directory / name / "vsock.sock_5002") as listener:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(enclave.directory / name / "vsock.sock"))
                client.sendall(b"CONNECT 7000\n")
                assert client.recv(100).startswith(b"OK ")
            answer(listener, seen, [])
        assert seen == [b"mine"]
        assert process.stdout.readline() == b"peer 3\n"
        assert process.stdout.read(4) == b"enim"
        assert process.wait(30) == 0
    finally:
        stop(process)


def test_a_heartbeat_without_an_answer_is_fatal_as_on_ec2(enclave: Enclave, rootfs: Path) -> None:
    """A host program at port 9000 takes the heartbeat and hangs up."""
    enclave.directory.mkdir(mode=0o700)
    with listening(enclave.directory / "parent" / "9000.sock") as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        done = enclave("run", f"dir:{rootfs}", "--json", "--", "sh", "-c", "exit 0")
        thread.join(60)
    assert done.returncode == 125
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error["code"] == "boot"
    assert "the enclave ended before its init gave a heartbeat: init: " in error["message"]
    assert "heartbeat" in error["message"].rpartition("init: ")[2]
