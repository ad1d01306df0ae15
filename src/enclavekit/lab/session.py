# SPDX-License-Identifier: Apache-2.0
"""A command in a lab's parent, from the host: its input, output and status through the agent (agent_frames.py)."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from enclavekit.errors import LabError, ProtocolError
from enclavekit.lab.agent_frames import MAX_PAYLOAD, Command, Decoder, Kind, decode_status, encode, encode_size

MAX_PENDING = 1 << 18


@dataclass(slots=True)
class Streams:
    """Where a command's input comes from and its output goes to."""

    stdout: Callable[[bytes], None]
    stderr: Callable[[bytes], None]
    stdin: int | None = None
    """A file that can be polled; None is none."""
    resized: int | None = None
    """Becomes readable when the terminal has another size, which ``size`` tells: rows and columns."""
    size: Callable[[], tuple[int, int]] = lambda: (24, 80)


def run_command(connection: socket.socket, command: Command, streams: Streams) -> int:
    """Run it to its end; returns its exit status, 128 + n for signal n. The connection is used up.

    Errors: LabError when the command cannot be run or the parent is gone, ProtocolError for nonsense.
    """
    with connection:
        try:
            encoded = command.encode()
        except ValueError as error:
            raise LabError(f"{command.words[0]}: command and environment are too long: {error}") from error
        connection.setblocking(False)
        return _Conversation(connection, encoded, streams).run()


class _Conversation:
    def __init__(self, connection: socket.socket, first: bytes, streams: Streams) -> None:
        self._connection, self._streams = connection, streams
        self._outgoing = bytearray(first)
        self._decoder = Decoder()
        self._heard = True
        """The agent still reads what we send."""
        self._stdin = streams.stdin
        if self._stdin is None:
            self._outgoing += encode(Kind.INPUT)

    def run(self) -> int:
        while True:
            for fd, events in self._poll():
                if fd == self._connection.fileno():
                    status = self._serve(events)
                    if status is not None:
                        return status
                elif fd == self._stdin:
                    data = os.read(fd, MAX_PAYLOAD)
                    self._outgoing += encode(Kind.INPUT, data)
                    if not data:
                        self._stdin = None
                else:
                    os.read(fd, 64)
                    if self._heard:
                        self._outgoing += encode_size(*self._streams.size())

    def _poll(self) -> list[tuple[int, int]]:
        poller = select.poll()
        poller.register(self._connection, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        if self._heard and self._stdin is not None and len(self._outgoing) < MAX_PENDING:
            poller.register(self._stdin, select.POLLIN)
        if self._streams.resized is not None:
            poller.register(self._streams.resized, select.POLLIN)
        return poller.poll()

    def _serve(self, events: int) -> int | None:
        try:
            if events & select.POLLOUT:
                self._send()
            if events & ~select.POLLOUT:
                data = self._connection.recv(MAX_PAYLOAD)
                if not data:
                    raise ConnectionResetError
                return self._take(self._decoder.feed(data))
        except BlockingIOError:
            pass
        except ConnectionError as error:
            raise LabError("the parent has ended, or the command's agent in it", hint="enclave lab status") from error
        return None

    def _send(self) -> None:
        try:
            del self._outgoing[: self._connection.send(self._outgoing)]
        except (BrokenPipeError, ConnectionResetError):
            self._heard = False  # what it has said is still to be read: it may say why
            self._outgoing.clear()

    def _take(self, frames: Iterator[tuple[Kind, bytes]]) -> int | None:
        for kind, payload in frames:
            match kind:
                case Kind.STDOUT:
                    self._streams.stdout(payload)
                case Kind.STDERR:
                    self._streams.stderr(payload)
                case Kind.STATUS:
                    return decode_status(payload)
                case Kind.FAILED:
                    said = payload[:1024].decode(errors="replace")
                    raise LabError(f"cannot be run in the parent: {''.join(c for c in said if c.isprintable())}")
                case _:
                    raise ProtocolError(f"agent frame {kind.name}: not expected from an agent")
        return None
