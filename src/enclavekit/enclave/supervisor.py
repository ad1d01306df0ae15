# SPDX-License-Identifier: Apache-2.0
"""One enclave from its start to its end: carry its output, obey who may command, know why it ended.

Stages: booting (until the heartbeat), running (the control connection to init is up), ended. Everything that happens
arrives at one selector: serial output, the heartbeat, init's frames, commands, the carrier's end, signals, the time.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from enclavekit.codec import init_frames
from enclavekit.enclave.attestation import Attestation
from enclavekit.enclave.control import ControlServer
from enclavekit.errors import (
    BootError,
    CarrierError,
    EnclaveConnectionError,
    EnclaveRefusedError,
    GuestError,
    GuestMemoryError,
    HeartbeatError,
    PanicError,
    ProtocolError,
)
from enclavekit.hypervisor.contract import Enclave

CONTROL_PORT = 9001
"""Init listens here."""

HEARTBEAT_TIMEOUT_S = 180.0
"""As nitro-cli has it for images below 6 GiB."""

END_TIMEOUT_S = 5.0
"""From init's last word, or the closing of its connection, to the end of the machine."""

DRAIN_TIMEOUT_S = 1.0
"""For the device to hand over what came before the end."""

STOP_GRACE_S = 5.0
"""Between the polite signal and the end by force."""

CONSOLE_TAIL = 64 * 1024
READ_SIZE = 1 << 16
DEBUG_HINT = "run it with --debug to see its console"
LONGEST_WAIT_S = 3600.0
CONNECT_TIMEOUT_S = 10.0
"""Init listens before its heartbeat, but the machine may be busy."""

# What can be told from the serial port when a guest ends without a word over vsock.
CONSOLE_CLUES = re.compile(
    rb"(?:^|\n)(?:\[[^\]\n]*\] )?((?:loader|init): [^\r\n]+|Kernel panic - not syncing: [^\r\n]+)"
)


PANIC = "Kernel panic"
OUT_OF_MEMORY = b"Out of memory: Killed process"
MEMORY_PANIC = re.compile("deadlocked on memory|[Oo]ut of memory")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an enclave ended: the application's exit code, or the signal that ended it."""

    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    stopped: bool = False
    """By force, on request, before the application said its status."""
    out_of_memory: bool = False
    """The enclave's kernel had to kill a program to go on."""

    @property
    def reason(self) -> str:
        """In a word."""
        if self.timed_out:
            return "timeout"
        if self.out_of_memory:
            return "out-of-memory"
        if self.exit_code is not None:
            return "exited"
        return "signalled" if self.signal is not None else "stopped"


@dataclass(frozen=True, slots=True)
class Streams:
    """Where output goes: bytes of the application's stdout and stderr, and of the console (None: not shown)."""

    output: Callable[[bytes], None]
    console: Callable[[bytes], None] | None = None
    on_running: Callable[[bool], None] | None = None
    """Called once the application runs, with whether the image gives its output to the host."""
    on_lost: Callable[[int], None] | None = None
    """Called with a count of bytes of output that init had to drop: nobody took them in time."""


class Supervisor:
    """Watches one launched enclave to its end. Not thread-safe, but for ``request_stop``."""

    def __init__(
        self,
        enclave: Enclave,
        streams: Streams,
        *,
        timeout_s: float | None = None,
        values: Mapping[bytes, bytes] | None = None,
        heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
    ) -> None:
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._values = values or {}
        self._values_given = False
        self._enclave = enclave
        self._streams = streams
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._boot_deadline: float | None = time.monotonic() + heartbeat_timeout_s
        self._end_deadline: float | None = None
        self._selector = selectors.DefaultSelector()
        self._server: ControlServer | None = None
        self._grace_s = STOP_GRACE_S
        self._out_of_memory = False
        self._logs = False
        self.running = False
        """Whether the application runs; or an init that is another than ours."""
        self._control: socket.socket | None = None
        self._decoder = init_frames.Decoder()
        self._attestation = Attestation(self._send)
        self._tail = bytearray()
        self._status: init_frames.Status | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stop_requests = 0
        self._stop_requests_seen = 0
        self._forced = False
        self._over = False

    def request_stop(self) -> None:
        """Safe in a signal handler: once asks the application to end, twice ends the machine."""
        self._stop_requests += 1
        if self._over:
            return
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"s")

    def listen(self, directory: Path, status: Callable[[], dict[str, object]]) -> None:
        """Obey other processes on the directory's control socket, until ``tell_end``. Raises FileError."""
        self._server = ControlServer(
            self._selector, directory, status=status, stop=self.stop, attest=self._attestation.ask
        )

    def stop(self, grace_s: float) -> None:
        """Ask the application to end, and end the machine after the grace. A second time ends it at once."""
        self._grace_s = grace_s
        self.request_stop()

    def tell_end(self, ending: dict[str, object]) -> None:
        """After ``wait``: answer all who wait for the end, and listen no more."""
        if self._server is not None:
            self._server.end(ending)

    def wait(self) -> Outcome:
        """Until the end. Errors: ``BootError``, ``GuestError``, ``CarrierError``, ``ProtocolError``."""
        register = self._selector.register
        register(self._enclave.fileno(), selectors.EVENT_READ, None)
        register(self._enclave.heartbeat_fd(), selectors.EVENT_READ, self._heartbeat)
        register(self._wake_read, selectors.EVENT_READ, self._woken)
        console = self._enclave.console()
        if console is not None:
            register(console, selectors.EVENT_READ, self._read_console)
        try:
            while True:
                events = self._selector.select(self._patience())
                ended = False
                for key, _ in events:
                    if key.data is None:
                        ended = True
                    else:
                        key.data()
                if ended:
                    return self._ended()
                outcome = self._late()
                if outcome is not None:
                    return outcome
        finally:
            self._over = True
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            if self._control is not None:
                self._control.close()

    def _patience(self) -> float | None:
        deadlines = [at for at in (self._deadline, self._boot_deadline, self._end_deadline) if at is not None]
        return min(LONGEST_WAIT_S, max(0.0, min(deadlines) - time.monotonic())) if deadlines else None

    def _late(self) -> Outcome | None:
        """What to do about a deadline that has passed, or a stop by force."""
        now = time.monotonic()
        if self._forced or (self._end_deadline is not None and now >= self._end_deadline):
            outcome = self._outcome()
            if outcome is None and not self._stop_requests:
                raise GuestError("init closed its connection without the application's status", hint=DEBUG_HINT)
            return outcome or Outcome(stopped=True)
        if self._deadline is not None and now >= self._deadline:
            return Outcome(timed_out=True)
        if self._boot_deadline is not None and now >= self._boot_deadline:
            raise HeartbeatError(
                f"no heartbeat from the enclave's init within {self._heartbeat_timeout_s:.0f} s",
                hint=DEBUG_HINT,
            )
        return None

    def _woken(self) -> None:
        os.read(self._wake_read, 64)
        if self._stop_requests >= 2 or self._control is None:
            self._forced = True
        elif self._stop_requests_seen == 0:
            self._send(init_frames.Stop(signal=0, grace_ms=int(self._grace_s * 1000)))
            self._end_deadline = time.monotonic() + self._grace_s + END_TIMEOUT_S
        self._stop_requests_seen = self._stop_requests

    def _read_console(self) -> bool:
        """Take in what the serial line has said; whether there may be more."""
        console = self._enclave.console()
        if console is None or console not in self._selector.get_map():
            return False
        try:
            data = os.read(console, READ_SIZE)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(console)
            return False
        self._tail += data
        self._out_of_memory = self._out_of_memory or OUT_OF_MEMORY in self._tail
        del self._tail[:-CONSOLE_TAIL]
        if self._streams.console is not None:
            self._streams.console(data)
        return True

    def _heartbeat(self) -> None:
        self._selector.unregister(self._enclave.heartbeat_fd())
        self._boot_deadline = None
        try:
            self._control = self._enclave.connect(CONTROL_PORT, CONNECT_TIMEOUT_S)
        except EnclaveRefusedError:
            # Another init than ours (AWS's has no such port): the enclave runs, its end is all that we shall know.
            self._running(logs=False)
            return
        except EnclaveConnectionError:
            return  # it has ended, or its end will tell
        self._control.setblocking(False)
        self._selector.register(self._control, selectors.EVENT_READ, self._read_control)

    def _running(self, *, logs: bool) -> None:
        self.running = True
        if self._streams.on_running is not None:
            self._streams.on_running(logs)

    def _read_control(self) -> bool:
        """Take in what init has said; whether there may be more."""
        if self._control is None or self._control not in self._selector.get_map():
            return False
        try:
            data = self._control.recv(READ_SIZE)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(self._control)
            self._attestation.end()
            self._end_deadline = self._end_deadline or time.monotonic() + END_TIMEOUT_S
            return False
        for frame in self._decoder.feed(data):
            self._take(frame)
        return True

    def _take(self, frame: init_frames.Frame) -> None:
        match frame:
            case init_frames.Hello(logs=logs, waits=waits, attests=attests):
                self._attestation.greet(attests=attests)
                if waits and not self._values_given:
                    self._give_values()
                self._logs = logs
            case init_frames.Started():
                self._running(logs=self._logs)
            case init_frames.Stdout(data=data) | init_frames.Stderr(data=data):
                self._streams.output(data)
            case init_frames.Status():
                if self._status is None:
                    self._status = frame
                    self._send(init_frames.Ack())
                    self._end_deadline = time.monotonic() + END_TIMEOUT_S
            case init_frames.AttestationDocument():
                self._attestation.take(frame)
            case init_frames.Lost(count=count):
                if self._streams.on_lost is not None:
                    self._streams.on_lost(count)
            case _:
                pass

    def _give_values(self) -> None:
        """Init starts the application when it has them."""
        self._values_given = True
        if self._control is not None:
            self._control.settimeout(CONNECT_TIMEOUT_S)
            with contextlib.suppress(OSError):
                for name, value in self._values.items():
                    self._control.sendall(init_frames.encode(init_frames.Value(name, value)))
                self._control.sendall(init_frames.encode(init_frames.Start()))
            self._control.setblocking(False)

    def _send(self, frame: init_frames.Frame) -> None:
        if self._control is not None:
            with contextlib.suppress(OSError):  # init is gone: the carrier's end tells the rest
                self._control.send(init_frames.encode(frame))

    def _ended(self) -> Outcome:
        """The machine is off: take what is still in the pipes, then say why."""
        while self._read_console():
            pass
        # What init said last may still be on its way through the device, which closes the connection behind it.
        if self._control is not None:
            self._control.settimeout(DRAIN_TIMEOUT_S)
            with contextlib.suppress(TimeoutError, ProtocolError):
                while self._read_control():
                    pass
        outcome = self._outcome()
        if outcome is not None:
            return outcome
        failure = self._enclave.failure()
        if failure is not None:
            raise CarrierError(failure)
        clue = self._clue()
        if clue and clue.startswith(PANIC):
            kind = GuestMemoryError if MEMORY_PANIC.search(clue) else PanicError
            raise kind(f"the enclave's kernel gave up: {clue}", hint=DEBUG_HINT)
        if self._boot_deadline is not None:
            raise BootError(
                "the enclave ended before its init gave a heartbeat" + (f": {clue}" if clue else ""),
                hint=DEBUG_HINT,
            )
        if self._stop_requests:
            return Outcome(stopped=True)
        raise GuestError(
            "the enclave ended without the application's status" + (f": {clue}" if clue else ""),
            hint=DEBUG_HINT,
        )

    def _outcome(self) -> Outcome | None:
        if self._status is None:
            return None
        match self._status.kind:
            case init_frames.StatusKind.EXITED:
                return Outcome(exit_code=self._status.value)
            case init_frames.StatusKind.SIGNALLED:
                return Outcome(signal=self._status.value, out_of_memory=self._killed_for_memory())
            case init_frames.StatusKind.FAILED:
                if self._stop_requests:
                    return Outcome(stopped=True)
                raise GuestError(f"init: {self._status.message}")

    def _killed_for_memory(self) -> bool:
        return self._status is not None and self._status.value == signal.SIGKILL and self._out_of_memory

    def _clue(self) -> str | None:
        """The last telling line of the console."""
        found = CONSOLE_CLUES.findall(bytes(self._tail))
        return found[-1].decode(errors="replace") if found else None
