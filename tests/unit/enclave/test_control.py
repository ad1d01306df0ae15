# SPDX-License-Identifier: Apache-2.0
"""The control socket: what it answers, and that nothing that a client does disturbs anybody else."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from enclavekit.enclave import control
from enclavekit.enclave.control import MAX_CLIENTS, ControlServer, ask
from enclavekit.errors import ControlError, FileError, NoEnclaveError


class Served:
    """A server in a thread; ``finish`` ends it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stops: list[float] = []
        self.selector = selectors.DefaultSelector()
        self.server = ControlServer(
            self.selector, directory, status=lambda: {"state": "running"}, stop=self.stops.append, attest=self._attest
        )
        self._wake, self._waker = socket.socketpair()
        self.selector.register(self._wake, selectors.EVENT_READ, None)
        self._ending: dict[str, object] = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _attest(self, nonce: bytes, reply: Callable[[dict[str, object]], None]) -> None:
        reply({"document": nonce.hex()})

    def _run(self) -> None:
        while True:
            for key, _ in self.selector.select():
                if key.data is None:
                    self.selector.close()
                    self.server.end(self._ending)
                    return
                key.data()

    def finish(self, **ending: object) -> None:
        if self._thread.is_alive():
            self._ending = ending
            self._waker.send(b"x")
            self._thread.join()
            self._wake.close()
            self._waker.close()

    def raw(self, data: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(self.directory / "control.sock"))
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            received = b""
            while part := client.recv(4096):
                received += part
        return received


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.finish()


def test_status_and_stop(served: Served) -> None:
    assert ask(served.directory, {"command": "status"}) == {"state": "running"}
    assert ask(served.directory, {"command": "stop", "grace_s": 7}) == {"stopping": True}
    assert ask(served.directory, {"command": "stop"}) == {"stopping": True}
    assert served.stops == [7.0, 5.0]
    assert (served.directory / "control.sock").stat().st_mode & 0o777 == 0o600


def test_who_waits_is_told_the_end(served: Served) -> None:
    answers: list[object] = []
    waiting = threading.Thread(target=lambda: answers.append(ask(served.directory, {"command": "wait"}, timeout_s=10)))
    waiting.start()
    while not served.server._waiting:
        assert ask(served.directory, {"command": "status"}) is not None
    served.finish(reason="exited", exit_code=3)
    waiting.join()
    assert answers == [{"reason": "exited", "exit_code": 3}]
    assert list(served.directory.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"garbage\n", b'{"error": "not a line of JSON"}\n'),
        (b"[" * 3000 + b"\n", b'{"error": "not a line of JSON"}\n'),
        (b"[]\n", b'{"error": "unknown command, expected status, stop, wait or attest"}\n'),
        (b'{"command": ["stop"]}\n', b'{"error": "unknown command, expected status, stop, wait or attest"}\n'),
        (b'{"command": "stop", "grace_s": -1}\n', b'{"error": "grace_s: expected seconds from 0 to 86400"}\n'),
        (b'{"command": "stop", "grace_s": NaN}\n', b'{"error": "grace_s: expected seconds from 0 to 86400"}\n'),
        (b'{"command": "stop", "grace_s": true}\n', b'{"error": "grace_s: expected seconds from 0 to 86400"}\n'),
        (b'{"command": "status"}', b""),
        (b"", b""),
        (b'{"command": "status"}\n{"command": "status"}\n', b'{"state": "running"}\n{"state": "running"}\n'),
    ],
)
def test_what_is_no_request(served: Served, data: bytes, answer: bytes) -> None:
    assert served.raw(data) == answer
    assert served.stops == []
    assert ask(served.directory, {"command": "status"}) == {"state": "running"}


def test_a_line_without_end_is_not_read(served: Served) -> None:
    with pytest.raises(ConnectionResetError):  # for what it had not read
        served.raw(b"x" * 100_000)
    assert ask(served.directory, {"command": "status"}) == {"state": "running"}


def test_too_many_clients_are_turned_away(served: Served) -> None:
    clients = []
    for _ in range(MAX_CLIENTS):
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(served.directory / "control.sock"))
        client.sendall(b'{"command": "status"}\n')
        assert client.recv(100)
        clients.append(client)
    assert ask(served.directory, {"command": "status"}) is None
    for client in clients:
        client.close()


def test_another_user_is_not_listened_to(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    class Peer:
        size = 12

        @staticmethod
        def unpack(data: bytes) -> tuple[int, int, int]:
            del data
            return 1, 12345, 1

    monkeypatch.setattr(control, "_PEER", Peer)
    assert ask(served.directory, {"command": "stop"}) is None
    assert served.stops == []


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NoEnclaveError) as caught:
        ask(tmp_path, {"command": "status"})
    assert caught.value.message == f"enclave {tmp_path.name}: does not run"
    with pytest.raises(FileError):
        ControlServer(selectors.DefaultSelector(), tmp_path / "none", status=dict, stop=lambda grace: None)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"no json\n", "an answer that is no JSON"),
        (b"[]\n", "an answer that is no object"),
        (b'{"error": "no"}\n', "no"),
        (b"x" * ((1 << 16) + 10), "an answer of more than 65536 bytes"),
    ],
)
def test_a_process_that_answers_otherwise(tmp_path: Path, said: bytes, message: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(100)
                client.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ControlError) as caught:
            ask(tmp_path, {"command": "status"})
        thread.join()
    assert caught.value.message == f"enclave {tmp_path.name}: {message}"


def test_a_process_that_says_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()
        with pytest.raises(ControlError, match=r": no answer within 0\.05 s$"):
            ask(tmp_path, {"command": "status"}, timeout_s=0.05)


def test_a_document_is_asked_for_by_its_nonce(served: Served) -> None:
    assert ask(served.directory, {"command": "attest", "nonce": "00fF"}) == {"document": "00ff"}
    for nonce in ("", "0", "zz", "00" * 1025, 7, None, " 00", "00\n"):
        with pytest.raises(ControlError, match="nonce: expected 1 to 1024 bytes in hexadecimal"):
            ask(served.directory, {"command": "attest", "nonce": nonce})
