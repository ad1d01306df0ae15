# SPDX-License-Identifier: Apache-2.0
"""Commands through the agent: its own process at one end of a socket pair, the host's side at the other."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.errors import LabError, ProtocolError
from enclavekit.lab.agent_frames import (
    HEADER,
    MAX_PAYLOAD,
    Command,
    Decoder,
    Kind,
    decode_size,
    decode_status,
    encode,
    encode_size,
)
from enclavekit.lab.session import Streams, run_command

AGENT = (
    "import socket, sys; from enclavekit.lab.agent import serve_one; serve_one(socket.socket(fileno=int(sys.argv[1])))"
)

RESIZED = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
print("ready", flush=True)
signal.sigwait({signal.SIGWINCH})
print(os.get_terminal_size(), flush=True)
sys.exit(5)
"""


@contextmanager
def agent() -> Iterator[socket.socket]:
    """The host's end of a connection to an agent."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen([sys.executable, "-c", AGENT, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    try:
        with ours:
            yield ours
    finally:
        process.wait(20)


def run(
    *words: str, stdin: bytes | None = None, size: tuple[int, int] | None = None, **environment: str
) -> tuple[int, bytes, bytes]:
    out, err = bytearray(), bytearray()
    read_end, write_end = os.pipe()
    feeder = threading.Thread(target=_feed, args=(write_end, stdin or b""))
    feeder.start()
    try:
        with agent() as connection:
            streams = Streams(out.extend, err.extend, None if stdin is None else read_end)
            status = run_command(connection, Command(list(words), environment, size), streams)
    finally:
        os.close(read_end)
        feeder.join()
    return status, bytes(out), bytes(err)


def _feed(fd: int, data: bytes) -> None:
    with suppress(BrokenPipeError), open(fd, "wb") as pipe:  # the command ended before it had all
        pipe.write(data)


def test_output_status_and_environment() -> None:
    assert run("sh", "-c", "echo out; echo err >&2; echo $WORD; exit 7", WORD="a b") == (7, b"out\na b\n", b"err\n")


def test_a_signal_is_a_status_as_in_shells() -> None:
    assert run("sh", "-c", "kill -TERM $$") == (143, b"", b"")


def test_input_both_ways_more_than_any_buffer_holds() -> None:
    data = bytes(range(256)) * (1 << 13)
    assert run("cat", stdin=data) == (0, data, b"")


def test_input_that_nobody_reads() -> None:
    assert run("true", stdin=bytes(1 << 20)) == (0, b"", b"")


def test_without_input_there_is_an_end() -> None:
    assert run("cat") == (0, b"", b"")


def test_what_the_command_leaves_running_is_not_waited_for() -> None:
    assert run("sh", "-c", "sleep 60 & echo here") == (0, b"here\n", b"")


def test_a_terminal_with_its_size() -> None:
    status, out, err = run("sh", "-c", "test -t 0 && test -t 2 && stty size; echo err >&2", size=(33, 77))
    assert (status, out, err) == (0, b"33 77\r\nerr\r\n", b"")


def test_a_terminal_that_becomes_larger() -> None:
    out = bytearray()
    read_end, write_end = os.pipe()

    def take(data: bytes) -> None:
        out.extend(data)
        if out.endswith(b"ready\r\n"):
            os.write(write_end, b"\0")

    try:
        with agent() as connection:
            streams = Streams(take, take, None, resized=read_end, size=lambda: (11, 22))
            status = run_command(connection, Command([sys.executable, "-c", RESIZED], size=(5, 6)), streams)
    finally:
        os.close(read_end)
        os.close(write_end)
    assert (status, bytes(out)) == (5, b"ready\r\nos.terminal_size(columns=22, lines=11)\r\n")


def test_a_connection_that_ends_kills_the_command(tmp_path: Path) -> None:
    fifo = tmp_path / "held"
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with agent() as connection:
            connection.sendall(Command(["sh", "-c", f"exec 3>{fifo}; echo ready; exec sleep 600"]).encode())
            assert connection.recv(1024) == encode(Kind.STDOUT, b"ready\n")
        assert select.select([held], [], [], 20)[0]
        assert os.read(held, 1) == b""  # its last writer has gone
    finally:
        os.close(held)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(LabError) as caught:
        run("/no/such")
    assert caught.value.message == "cannot be run in the parent: [Errno 2] No such file or directory: '/no/such'"


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (encode(Kind.INPUT, b"x"), b"frame INPUT: expected RUN first"),
        (b"\x77\0\0\0\0", b"agent frame 0x77: no such kind"),
        (b"\x81\0\x01\0\x01", b"agent frame 0x81: 65537 bytes, expected at most 65536"),
        (encode(Kind.RUN, b"[]"), b"run frame: expected words, environment and size as JSON"),
        (encode(Kind.RUN, b'{"words":[],"environment":{},"size":null}'), b"run frame: expected words, environment"),
        (encode(Kind.RUN, b'{"words":["a"],"environment":{},"size":[1]}'), b"run frame: expected words, environment"),
        (encode(Kind.RUN, b'{"words":[1],"environment":{},"size":null}'), b"run frame: expected words, environment"),
    ],
)
def test_what_the_agent_does_not_take(sent: bytes, said: bytes) -> None:
    with agent() as connection:
        connection.sendall(sent)
        connection.settimeout(20)
        answer = connection.recv(1024)
    assert answer[0] == Kind.FAILED
    assert answer[HEADER.size :].startswith(said)


def hostile(data: bytes) -> int:
    """The host's side with an agent that says this and goes."""
    ours, theirs = socket.socketpair()
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_WR)
    with theirs:
        return run_command(ours, Command(["true"]), Streams(lambda data: None, lambda data: None))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", LabError, "the parent has ended, or the command's agent in it"),
        (encode(Kind.STATUS), ProtocolError, "status frame: 0 bytes, expected 1"),
        (encode(Kind.RUN), ProtocolError, "agent frame RUN: not expected from an agent"),
        (encode(Kind.FAILED, b"\x1b[2Jno"), LabError, "cannot be run in the parent: [2Jno"),
    ],
)
def test_what_the_host_does_not_take(data: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        hostile(data)
    assert str(caught.value) == message


@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_status_or_an_error(data: bytes) -> None:
    with suppress(LabError, ProtocolError):
        assert 0 <= hostile(data) <= 255


@given(
    st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=50)), max_size=5),
    st.integers(min_value=1, max_value=20),
)
def test_frames_come_out_as_they_went_in(frames: list[tuple[Kind, bytes]], step: int) -> None:
    data = b"".join(encode(*frame) for frame in frames)
    decoder = Decoder()
    assert [one for at in range(0, len(data), step) for one in decoder.feed(data[at : at + step])] == frames


def test_an_agent_that_does_not_read_on_may_still_say_why() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(encode(Kind.FAILED, b"no such program"))
    theirs.close()  # with our input before it, or on its way
    with Path("/dev/zero").open("rb") as zeroes, pytest.raises(LabError) as caught:
        run_command(ours, Command(["true"]), Streams(lambda data: None, lambda data: None, zeroes.fileno()))
    assert caught.value.message == "cannot be run in the parent: no such program"


def test_small_layouts() -> None:
    assert decode_size(encode_size(24, 80)[HEADER.size :]) == (24, 80)
    assert decode_status(b"\x07") == 7
    command = Command.decode(Command(["a", "b"], {"K": "v"}, (3, 4)).encode()[HEADER.size :])
    assert (command.words, command.environment, command.size) == (["a", "b"], {"K": "v"}, (3, 4))
    with pytest.raises(ProtocolError, match=r"^resize frame: 3 bytes, expected 4$"):
        decode_size(b"abc")
    with pytest.raises(ValueError, match="65537 bytes"):
        encode(Kind.INPUT, bytes(MAX_PAYLOAD + 1))


def test_words_that_do_not_fit() -> None:
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(LabError) as caught:
        run_command(ours, Command(["x" * MAX_PAYLOAD]), Streams(lambda data: None, lambda data: None))
    assert "command and environment are too long" in caught.value.message
