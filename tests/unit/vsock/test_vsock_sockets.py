# SPDX-License-Identifier: Apache-2.0
"""enclavekit.vsock: into enclaves and out of them, blocking and with asyncio, here and on a parent of EC2."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from enclavekit import vsock
from enclavekit.enclave.directory import EnclaveDirectory, claim
from enclavekit.errors import EnclaveConnectionError, EnclaveRefusedError, FileError, NoEnclaveError
from enclavekit.vsock import sockets
from enclavekit.vsock.sockets import Caller, caller_of


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "enclavekit"


class Enclave:
    """Its device, as far as one connection goes: it answers ``answer``, then gives everything back."""

    def __init__(self, directory: EnclaveDirectory, answer: bytes) -> None:
        self.line = b""
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory.path / "vsock.sock"))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        with client:
            while not self.line.endswith(b"\n"):
                self.line += client.recv(1)
            client.sendall(self._answer)
            while self._answer.startswith(b"OK") and (data := client.recv(4096)):
                client.sendall(data)
            if self._answer == b"":
                client.recv(1)

    def close(self) -> None:
        self._thread.join(10)
        self._listener.close()


@pytest.fixture
def web(runtime: Path) -> Iterator[EnclaveDirectory]:
    made = claim(runtime, name="web")
    yield made
    made.remove()


@pytest.mark.parametrize("named", ["web", "id", 16])
def test_into_an_enclave(web: EnclaveDirectory, named: str | int) -> None:
    enclave = Enclave(web, b"OK 1073741824\nfirst")
    with vsock.connect(web.enclave_id if named == "id" else named, 5000) as connection:
        assert connection.recv(5) == b"first"
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"
        assert connection.gettimeout() is None
    enclave.close()
    assert enclave.line == b"CONNECT 5000\n"


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (b"-", EnclaveConnectionError, "port 5 of enclave web: "),
        (b"no\n", EnclaveConnectionError, "port 5 of enclave web: answered b'no\\n', expected OK and a port"),
        (b"x" * 100, EnclaveConnectionError, "port 5 of enclave web: answered b'xxx"),
        (b"", EnclaveConnectionError, "port 5 of enclave web: no answer within 0.2 s"),
    ],
)
def test_an_enclave_that_refuses(
    web: EnclaveDirectory, answer: bytes, kind: type[EnclaveConnectionError], message: str
) -> None:
    enclave = Enclave(web, answer)
    if answer == b"-":
        kind = EnclaveRefusedError
        message = "port 5 of enclave web: connection refused"
    with pytest.raises(kind) as caught:
        vsock.connect("web", 5, timeout_s=0.2)
    enclave.close()
    assert caught.value.message.startswith(message)


def test_nobody_there(runtime: Path, web: EnclaveDirectory) -> None:
    with pytest.raises(NoEnclaveError):
        vsock.connect("none", 5)
    with pytest.raises(NoEnclaveError) as caught:
        vsock.connect(99, 5)
    assert caught.value.message == "CID 99: no enclave has it"
    with pytest.raises(EnclaveConnectionError) as refused:
        vsock.connect("web", 5)
    assert refused.value.message == "port 5 of enclave web: no such file or directory"
    with pytest.raises(ValueError, match="port -1"):
        vsock.connect("web", -1)


def test_out_of_enclaves_before_there_are_any(runtime: Path) -> None:
    with vsock.listen(5000) as listener:
        place = runtime / "parent/5000.sock"
        with socket.socket(socket.AF_UNIX) as client:
            client.bind("\0enclavekit/0a1b2c3d/16:1024")
            client.connect(str(place))
            connection, caller = listener.accept()
            with connection:
                assert caller == Caller(16, 1024, "0a1b2c3d")
        with pytest.raises(FileError) as caught:
            vsock.listen(5000)
        assert caught.value.message == "cannot listen on port 5000: another program does"
        listener.settimeout(0.01)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert not place.exists()
    with vsock.listen(5000):
        assert place.exists()


def test_a_socket_that_a_dead_program_left_is_replaced(runtime: Path) -> None:
    vsock.listen(5000).close()
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(runtime / "parent/5000.sock"))
    left.close()
    with vsock.listen(5000), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(runtime / "parent/5000.sock"))


@pytest.mark.parametrize("name", [b"", "", None, b"\0enclavekit/x/16:1", b"\0enclavekit/0a1b2c3d/16:12345678901"])
def test_whoever_does_not_say_who_they_are(name: object) -> None:
    assert caller_of(name) == Caller(0, 0, "")


def test_asyncio(runtime: Path, web: EnclaveDirectory) -> None:
    enclave = Enclave(web, b"OK 1\n")
    callers: list[Caller] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, caller: Caller) -> None:
        callers.append(caller)
        writer.write((await reader.read()).upper())
        await writer.drain()

    async def work() -> bytes:
        reader, writer = await vsock.open_connection("web", 7)
        writer.write(b"there and back")
        writer.write_eof()
        assert await reader.read() == b"there and back"
        writer.close()
        async with vsock.start_server(handler, 5000):
            reader, writer = await asyncio.open_unix_connection(str(runtime / "parent/5000.sock"))
            writer.write(b"hello")
            writer.write_eof()
            received = await reader.read()
            writer.close()
            await writer.wait_closed()
            return received

    assert asyncio.run(work()) == b"HELLO"
    assert callers == [Caller(0, 0)]
    enclave.close()


class KernelSocket:
    """AF_VSOCK, as far as we use it."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error = error
        self.calls: list[tuple[object, ...]] = []

    def _call(self, *words: object) -> None:
        self.calls.append(words)
        if self.error is not None and words[0] in ("connect", "bind"):
            raise self.error

    def settimeout(self, value: float | None) -> None:
        self._call("settimeout", value)

    def connect(self, address: tuple[int, int]) -> None:
        self._call("connect", address)

    def bind(self, address: tuple[int, int]) -> None:
        self._call("bind", address)

    def listen(self, backlog: int) -> None:
        self._call("listen", backlog)

    def accept(self) -> tuple[str, tuple[int, int]]:
        return "connection", (16, 2000)

    def close(self) -> None:
        self._call("close")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> KernelSocket:
    made = KernelSocket()
    monkeypatch.setattr(sockets, "on_parent", lambda: True)
    monkeypatch.setattr(sockets, "_kernel_socket", lambda: made)
    return made


def test_on_a_parent_of_ec2_they_are_the_kernels(kernel: KernelSocket) -> None:
    made: object = vsock.connect(16, 5000, timeout_s=3)
    assert made is kernel
    assert kernel.calls == [("settimeout", 3), ("connect", (16, 5000)), ("settimeout", None)]
    kernel.calls.clear()
    with vsock.listen(5000, backlog=5) as listener:
        accepted: object = listener.accept()
        assert accepted == ("connection", Caller(16, 2000))
    assert kernel.calls == [("bind", (socket.VMADDR_CID_ANY, 5000)), ("listen", 5), ("close",)]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConnectionResetError(104, "Reset"), EnclaveRefusedError, "port 5 of CID 16: connection refused"),
        (TimeoutError("timed out"), EnclaveConnectionError, "port 5 of CID 16: timed out"),
        (OSError(19, "No such device"), EnclaveConnectionError, "port 5 of CID 16: no such device"),
    ],
)
def test_on_a_parent_errors_are_ours(
    kernel: KernelSocket, error: OSError, kind: type[EnclaveConnectionError], message: str
) -> None:
    kernel.error = error
    with pytest.raises(kind) as caught:
        vsock.connect(16, 5)
    assert (type(caught.value), caught.value.message) == (kind, message)
    with pytest.raises(FileError):
        vsock.listen(5)
    assert kernel.calls.count(("close",)) == 2
