# SPDX-License-Identifier: Apache-2.0
"""What runs in a lab's parent: commands for the host, each connection one, with or without a terminal.

It listens on vsock and serves only the hypervisor's CID, behind which the lab's own process is. A process of its own
serves each connection; when that ends early, the command's whole session is killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import termios
from collections.abc import Iterable
from struct import Struct

from enclavekit.errors import ProtocolError
from enclavekit.lab.agent_frames import STATUS, Command, Decoder, Kind, decode_size, encode

HYPERVISOR_CID = 0
ANY_CID = 0xFFFF_FFFF
CHUNK = 1 << 14
MAX_PENDING = 1 << 18
"""Bytes, either way, that wait for a slow reader; then the other side has to wait."""
RUN_TIMEOUT_S = 10.0
LINGER_S = 30.0
BACKLOG = 64

WINSIZE = Struct(
    "="  #  struct winsize, as this machine has it
    "H"  #  rows
    "H"  #  columns
    "4x"  # in pixels, which nobody uses
)


def serve(port: int) -> None:
    """For ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # of sessions; nobody waits for them
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((ANY_CID, port))
    listener.listen(BACKLOG)
    while True:
        connection, (cid, _) = listener.accept()
        if cid == HYPERVISOR_CID and os.fork() == 0:
            listener.close()
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                serve_one(connection)
            finally:
                os._exit(0)
        connection.close()


def serve_one(connection: socket.socket) -> None:
    """One command, from its RUN frame to its end."""
    decoder = Decoder()
    connection.settimeout(RUN_TIMEOUT_S)
    frames: list[tuple[Kind, bytes]] = []
    try:
        while not frames:
            data = connection.recv(CHUNK)
            if not data:
                return
            frames += decoder.feed(data)
        (kind, payload), *others = frames
        if kind is not Kind.RUN:
            raise ProtocolError(f"frame {kind.name}: expected RUN first")
        command = Command.decode(payload)
        session = Session(connection, decoder, command)
    except (ProtocolError, OSError) as error:
        with contextlib.suppress(OSError):
            connection.sendall(encode(Kind.FAILED, str(error).encode()[:1024]))
        return
    try:
        with contextlib.suppress(ProtocolError, ConnectionError, TimeoutError):
            session.run(others)
    finally:
        session.kill()


class Session:
    """A command that runs, and its host. OSError when it cannot be run."""

    def __init__(self, connection: socket.socket, decoder: Decoder, command: Command) -> None:
        connection.setblocking(False)
        self._connection, self._decoder = connection, decoder
        self._outgoing, self._input = bytearray(), bytearray()
        self._input_ended = False
        self._terminal = -1
        self._stdin = -1
        self._sources: dict[int, Kind] = {}
        """What is read, and what it is sent as."""
        self._status: int | None = None
        if command.size is not None:
            self._start_with_terminal(command, *command.size)
        else:
            self._start(command)

    def _start(self, command: Command) -> None:
        stdin, self._stdin = os.pipe()
        out, stdout = os.pipe()
        err, stderr = os.pipe()
        self._sources = {out: Kind.STDOUT, err: Kind.STDERR}
        self._pid = self._spawn(command, stdin, stdout, stderr)
        for fd in (stdin, stdout, stderr):
            os.close(fd)
        os.set_blocking(self._stdin, False)

    def _start_with_terminal(self, command: Command, rows: int, columns: int) -> None:
        self._terminal, terminal = os.openpty()
        self._resize(rows, columns)
        self._stdin = self._terminal
        self._sources = {self._terminal: Kind.STDOUT}
        self._pid = self._spawn(command, terminal, terminal, terminal)
        os.close(terminal)
        os.set_blocking(self._terminal, False)

    def _spawn(self, command: Command, *standard: int) -> int:
        """What keeps the child from running comes through a pipe that closes on exec, as an errno."""
        said, saying = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                if self._terminal >= 0:
                    fcntl.ioctl(standard[0], termios.TIOCSCTTY, 0)
                for number, fd in enumerate(standard):
                    os.dup2(fd, number)
                for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
                    signal.signal(number, signal.SIG_DFL)
                os.execvpe(command.words[0], command.words, {**os.environ, **command.environment})  # noqa: S606
            except (OSError, ValueError) as error:
                os.write(saying, str(getattr(error, "errno", None) or errno.EINVAL).encode())
            finally:
                os._exit(127)
        os.close(saying)
        failed = os.read(said, 16)
        os.close(said)
        if failed:
            os.waitpid(pid, 0)
            raise OSError(int(failed), os.strerror(int(failed)), command.words[0])
        return pid

    def _resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, WINSIZE.pack(rows, columns))

    def run(self, frames: Iterable[tuple[Kind, bytes]]) -> None:
        """Until the command has ended and all that it has said is sent. Errors: ProtocolError, ConnectionError."""
        child = os.pidfd_open(self._pid)
        self._take(frames)
        while self._status is None:
            self._turn(child)
        # What it left running may hold its output open, and is not waited for.
        for fd, kind in self._sources.items():
            os.set_blocking(fd, False)
            with contextlib.suppress(OSError):  # nothing more, or nobody has the terminal
                for _ in range(0, MAX_PENDING, CHUNK):
                    self._outgoing += encode(kind, os.read(fd, CHUNK))
        self._connection.settimeout(None)
        self._connection.sendall(self._outgoing + encode(Kind.STATUS, STATUS.pack(self._status)))
        # Input that nobody read must not make this end a reset, which could overtake the status.
        self._connection.settimeout(LINGER_S)
        while self._connection.recv(CHUNK):
            pass

    def _turn(self, child: int) -> None:
        wanted = {child: select.POLLIN, self._connection.fileno(): 0}
        if len(self._input) < MAX_PENDING:
            wanted[self._connection.fileno()] |= select.POLLIN
        if self._outgoing:
            wanted[self._connection.fileno()] |= select.POLLOUT
        if len(self._outgoing) < MAX_PENDING:
            wanted |= dict.fromkeys(self._sources, select.POLLIN)
        if self._input:
            wanted[self._stdin] = wanted.get(self._stdin, 0) | select.POLLOUT
        poller = select.poll()
        for fd, events in wanted.items():
            poller.register(fd, events)
        for fd, events in poller.poll():
            if fd == child:
                code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
                self._status = code if code >= 0 else 128 - code
            elif fd == self._connection.fileno():
                self._serve_host(events)
            else:
                if events & ~select.POLLOUT and fd in self._sources:
                    self._read(fd)
                if events & (select.POLLOUT | select.POLLERR) and fd == self._stdin:
                    self._write()

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:  # nobody has the terminal any more
            data = b""
        if data:
            self._outgoing += encode(self._sources[fd], data)
        else:
            del self._sources[fd]

    def _write(self) -> None:
        try:
            del self._input[: os.write(self._stdin, self._input)]
        except BlockingIOError:
            return
        except OSError:  # it does not want to read
            self._input_ended = True
            self._input.clear()
        self._end_input()

    def _end_input(self) -> None:
        """Of a pipe, once all is written. A terminal has no end."""
        if self._input_ended and not self._input and self._stdin not in (-1, self._terminal):
            os.close(self._stdin)
            self._stdin = -1

    def _serve_host(self, events: int) -> None:
        if events & select.POLLOUT:
            del self._outgoing[: self._connection.send(self._outgoing)]
        if events & ~select.POLLOUT:
            with contextlib.suppress(BlockingIOError):
                data = self._connection.recv(CHUNK)
                if not data:
                    raise ConnectionResetError
                self._take(self._decoder.feed(data))

    def _take(self, frames: Iterable[tuple[Kind, bytes]]) -> None:
        for kind, payload in frames:
            if kind is Kind.INPUT:
                if self._stdin >= 0 and not self._input_ended:
                    self._input += payload
                    self._input_ended = not payload
                    self._end_input()
            elif kind is Kind.RESIZE:
                size = decode_size(payload)
                if self._terminal >= 0:
                    self._resize(*size)
            else:
                raise ProtocolError(f"frame {kind.name}: not expected here")

    def kill(self) -> None:
        """The command with its process group, if it still runs."""
        if self._status is None:
            with contextlib.suppress(OSError):
                os.killpg(self._pid, signal.SIGKILL)
