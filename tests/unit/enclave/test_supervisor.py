# SPDX-License-Identifier: Apache-2.0
"""The supervisor over a fake enclave: pipes and sockets that a test plays init and carrier on."""

from __future__ import annotations

import gc
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from enclavekit.codec.init_frames import (
    Ack,
    Decoder,
    Frame,
    Hello,
    Lost,
    Start,
    Started,
    Status,
    StatusKind,
    Stderr,
    Stdout,
    Stop,
    Value,
    encode,
)
from enclavekit.enclave import run as run_module
from enclavekit.enclave.directory import claim
from enclavekit.enclave.log_file import LIMIT, LogFile
from enclavekit.enclave.run import check_cpu_list, check_host, check_memory, ending_of
from enclavekit.enclave.supervisor import Outcome, Streams, Supervisor
from enclavekit.errors import (
    BootError,
    CarrierError,
    EnclaveRefusedError,
    Error,
    GuestError,
    GuestMemoryError,
    LaunchError,
    NotEnoughMemoryError,
    PanicError,
    ProtocolError,
)
from enclavekit.hypervisor.accel import Accel
from enclavekit.hypervisor.contract import Enclave, Statistics
from enclavekit.hypervisor.nitro import NitroCarrier
from enclavekit.hypervisor.qemu import QemuCarrier


class FakeEnclave:
    """Ends when ``end`` is called, as a carrier's process would."""

    def __init__(self) -> None:
        self.alive, self._alive_write = os.pipe()
        self.beat = os.eventfd(0, os.EFD_NONBLOCK)
        self.console_socket, self.serial = socket.socketpair()
        self.console_socket.setblocking(False)
        self.init, self._control = socket.socketpair()
        self.listening = True
        self.said: str | None = None
        self._ended = False

    def fileno(self) -> int:
        return self.alive

    def heartbeat_fd(self) -> int:
        return self.beat

    def console(self) -> int:
        return self.console_socket.fileno()

    def connect(self, port: int, timeout_s: float) -> socket.socket:
        assert (port, timeout_s) == (9001, 10.0)
        if not self.listening:
            raise EnclaveRefusedError("refused")
        return self._control

    def failure(self) -> str | None:
        return self.said

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            os.close(self._alive_write)

    def close(self) -> None:
        self.end()
        os.close(self.alive)
        os.close(self.beat)
        for each in (self.console_socket, self.serial, self.init, self._control):
            each.close()


@pytest.fixture
def enclave() -> Iterator[FakeEnclave]:
    made = FakeEnclave()
    yield made
    made.close()


def acknowledged(enclave: FakeEnclave) -> None:
    """Init's end: the host has its status."""
    enclave.init.recv(5)
    enclave.end()


def supervise(enclave: FakeEnclave, output: list[bytes] | None = None, **options: Any) -> Supervisor:
    seen = [] if output is None else output
    return Supervisor(cast(Enclave, enclave), Streams(seen.append), **options)


def test_values_are_given_once_to_an_init_that_waits(enclave: FakeEnclave) -> None:
    os.eventfd_write(enclave.beat, 1)
    hello = encode(Hello(waits=True))
    enclave.init.sendall(hello + hello + encode(Status(StatusKind.EXITED, 0)))
    enclave.end()
    assert supervise(enclave, values={b"A": b"1", b"B": b""}).wait() == Outcome(exit_code=0)
    said = Decoder().feed(enclave.init.recv(1 << 16))
    assert list(said) == [Value(b"A", b"1"), Value(b"B", b""), Start(), Ack()]


def test_an_init_that_waits_for_values_of_which_there_are_none_may_start(enclave: FakeEnclave) -> None:
    os.eventfd_write(enclave.beat, 1)
    enclave.init.sendall(encode(Hello(waits=True)) + encode(Status(StatusKind.EXITED, 0)))
    enclave.end()
    assert supervise(enclave).wait() == Outcome(exit_code=0)
    assert list(Decoder().feed(enclave.init.recv(1 << 16))) == [Start(), Ack()]


def test_status_and_output(enclave: FakeEnclave) -> None:
    output: list[bytes] = []
    running: list[bool] = []
    os.eventfd_write(enclave.beat, 1)
    frames: list[Frame] = [Hello(logs=True), Started(), Stdout(b"out"), Stderr(b"err"), Status(StatusKind.EXITED, 42)]
    enclave.init.sendall(b"".join(encode(frame) for frame in frames))
    supervisor = Supervisor(cast(Enclave, enclave), Streams(output.append, on_running=running.append))
    thread = threading.Thread(target=acknowledged, args=(enclave,))
    thread.start()
    assert supervisor.wait() == Outcome(exit_code=42)
    thread.join()
    assert (output, running) == ([b"out", b"err"], [True])


def test_lost_output_is_told(enclave: FakeEnclave) -> None:
    lost: list[int] = []
    os.eventfd_write(enclave.beat, 1)
    enclave.init.sendall(encode(Lost(1234)) + encode(Status(StatusKind.EXITED, 0)))
    thread = threading.Thread(target=acknowledged, args=(enclave,))
    thread.start()
    Supervisor(cast(Enclave, enclave), Streams(lambda _: None, on_lost=lost.append)).wait()
    thread.join()
    assert lost == [1234]


def test_the_status_is_acknowledged(enclave: FakeEnclave) -> None:
    os.eventfd_write(enclave.beat, 1)
    enclave.init.sendall(encode(Status(StatusKind.SIGNALLED, 9)))
    answers: list[object] = []

    def init() -> None:
        answers.extend(Decoder().feed(enclave.init.recv(100)))
        enclave.end()

    thread = threading.Thread(target=init)
    thread.start()
    assert supervise(enclave).wait() == Outcome(signal=9)
    thread.join()
    assert answers == [Ack()]


def test_what_init_could_not_do(enclave: FakeEnclave) -> None:
    os.eventfd_write(enclave.beat, 1)
    enclave.init.sendall(encode(Status(StatusKind.FAILED, 0, "cannot run /x: No such file or directory")))
    thread = threading.Thread(target=acknowledged, args=(enclave,))
    thread.start()
    with pytest.raises(GuestError) as caught:
        supervise(enclave).wait()
    thread.join()
    assert str(caught.value) == "init: cannot run /x: No such file or directory"


def test_an_end_before_the_heartbeat_with_the_loaders_words(enclave: FakeEnclave) -> None:
    enclave.serial.send(b"\r\nloader: image magic: got 0x78787878, expected 0x2e656966\r\n")
    enclave.end()
    with pytest.raises(BootError) as caught:
        supervise(enclave).wait()
    assert str(caught.value) == (
        "the enclave ended before its init gave a heartbeat: loader: image magic: got 0x78787878, expected 0x2e656966"
    )


def test_a_panic_for_lack_of_memory_is_another_error(enclave: FakeEnclave) -> None:
    enclave.serial.send(b"\n[    1.5] Kernel panic - not syncing: System is deadlocked on memory\r\n")
    enclave.end()
    with pytest.raises(GuestMemoryError):
        supervise(enclave).wait()


@pytest.mark.parametrize("said", [True, False])
def test_an_application_that_the_kernel_killed_for_memory(enclave: FakeEnclave, said: bool) -> None:
    os.eventfd_write(enclave.beat, 1)
    if said:
        enclave.serial.send(b"[    9.5] Out of memory: Killed process 71 (app) total-vm:1kB\r\n")
    enclave.init.sendall(encode(Hello()) + encode(Status(StatusKind.SIGNALLED, 9)))
    enclave.end()
    outcome = supervise(enclave).wait()
    assert outcome == Outcome(signal=9, out_of_memory=said)
    assert outcome.reason == ("out-of-memory" if said else "signalled")


def test_a_panic_is_told(enclave: FakeEnclave) -> None:
    os.eventfd_write(enclave.beat, 1)
    enclave.serial.send(b"[    1.5] Kernel panic - not syncing: Attempted to kill init!\r\n")
    enclave.end()
    with pytest.raises(PanicError) as caught:
        supervise(enclave).wait()
    assert str(caught.value) == ("the enclave's kernel gave up: Kernel panic - not syncing: Attempted to kill init!")


def test_a_carrier_that_failed_is_told(enclave: FakeEnclave) -> None:
    enclave.said = "QEMU ended with exit status 1: no such option"
    enclave.end()
    with pytest.raises(CarrierError, match=r"^QEMU ended with exit status 1: no such option$"):
        supervise(enclave).wait()


def test_timeout(enclave: FakeEnclave) -> None:
    assert supervise(enclave, timeout_s=0.05).wait() == Outcome(timed_out=True)


@pytest.mark.parametrize("jump_s", [1e6, -1e6])
def test_a_clock_that_jumps_moves_no_deadline(
    enclave: FakeEnclave, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    true_time = time.time
    clock = itertools.count(0, jump_s)
    monkeypatch.setattr(time, "time", lambda: true_time() + next(clock))
    start = time.monotonic()
    assert supervise(enclave, timeout_s=0.05).wait() == Outcome(timed_out=True)
    assert time.monotonic() - start < 30
    os.eventfd_write(enclave.beat, 1)
    enclave.init.sendall(encode(Hello()) + encode(Started()) + encode(Status(StatusKind.EXITED, 3)))
    enclave.end()
    assert supervise(enclave, timeout_s=60).wait() == Outcome(exit_code=3)


def test_a_console_flood_of_100_mib_is_bounded(enclave: FakeEnclave, tmp_path: Path) -> None:
    log = LogFile(tmp_path / "console.log")
    tail = b"\n[    9.5] Kernel panic - not syncing: Attempted to kill init!\r\n"

    def flood() -> None:
        for _ in range(100):
            enclave.serial.sendall(b"x" * (1 << 20))
        enclave.serial.sendall(tail)
        enclave.end()

    thread = threading.Thread(target=flood)
    thread.start()
    supervisor = Supervisor(cast(Enclave, enclave), Streams(lambda _: None, console=log.write))
    with pytest.raises(PanicError):
        supervisor.wait()
    thread.join()
    log.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"console.log", "console.log.1"}
    assert max(sizes.values()) <= LIMIT
    assert (tmp_path / "console.log").read_bytes().endswith(tail)
    assert len(supervisor._tail) <= 64 << 10


def test_the_uptime_does_not_follow_the_clock(
    enclave: FakeEnclave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = claim(tmp_path / "run")
    enclave.statistics = lambda: Statistics(1.5, 4096, 2, 10, 20)  # type: ignore[attr-defined]
    monkeypatch.setattr(time, "time", lambda: 0.0)
    status = run_module._status(directory, cast(Enclave, enclave), supervise(enclave), time.monotonic() - 5)
    directory.remove()
    assert 5 <= cast(float, status["uptime_s"]) < 30
    assert (status["cpu_s"], status["resident"], status["connections"]) == (1.5, 4096, 2)


def test_a_stop_before_init_is_there_is_by_force(enclave: FakeEnclave) -> None:
    supervisor = supervise(enclave)
    supervisor.request_stop()
    assert supervisor.wait() == Outcome(stopped=True)


def test_a_stop_is_asked_for_once_and_the_status_still_counts(enclave: FakeEnclave) -> None:
    os.eventfd_write(enclave.beat, 1)
    requests: list[object] = []
    supervisor = Supervisor(
        cast(Enclave, enclave), Streams(lambda _: None, on_running=lambda _: supervisor.request_stop())
    )

    def init() -> None:
        enclave.init.sendall(encode(Hello()) + encode(Started()))
        requests.extend(Decoder().feed(enclave.init.recv(100)))
        enclave.init.sendall(encode(Status(StatusKind.EXITED, 5)))
        enclave.init.recv(100)
        enclave.end()

    thread = threading.Thread(target=init)
    thread.start()
    assert supervisor.wait() == Outcome(exit_code=5)
    thread.join()
    assert requests == [Stop(signal=0, grace_ms=5000)]


def test_another_init_than_ours_is_only_waited_for(enclave: FakeEnclave) -> None:
    os.eventfd_write(enclave.beat, 1)
    enclave.listening = False
    running: list[bool] = []

    def on_running(logs: bool) -> None:
        running.append(logs)
        enclave.end()

    supervisor = Supervisor(cast(Enclave, enclave), Streams(lambda _: None, on_running=on_running))
    with pytest.raises(GuestError, match="the enclave ended without the application's status"):
        supervisor.wait()
    assert running == [False]


def test_a_hostile_init(enclave: FakeEnclave) -> None:
    os.eventfd_write(enclave.beat, 1)
    enclave.init.sendall(b"\x03\xff\xff\xff\xff")
    with pytest.raises(ProtocolError):
        supervise(enclave).wait()


def descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_two_hundred_lives_leak_nothing(tmp_path: Path) -> None:
    """Directories, control sockets, descriptors: as many after them as before."""

    def life(number: int) -> None:
        directory = claim(tmp_path / "run", name=f"e{number % 7}")
        made = FakeEnclave()
        supervisor = supervise(made)
        supervisor.listen(directory.path, lambda: {"state": "running"})
        os.eventfd_write(made.beat, 1)
        made.init.sendall(encode(Hello()) + encode(Started()) + encode(Status(StatusKind.EXITED, number % 256)))
        made.init.shutdown(socket.SHUT_WR)
        made.end()
        outcome = supervisor.wait()
        made.close()
        directory.end(**ending_of(outcome))
        supervisor.tell_end(ending_of(outcome))
        assert outcome == Outcome(exit_code=number % 256)

    life(0)
    gc.collect()
    before = descriptors()
    for number in range(200):
        life(number)
    gc.collect()
    assert descriptors() == before
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["ended", "lock", "parent"]
    assert len(list((tmp_path / "run/ended").iterdir())) == 64


@pytest.mark.parametrize(
    ("end", "record"),
    [
        (Outcome(exit_code=0), {"reason": "exited", "exit_code": 0, "signal": None}),
        (Outcome(signal=9), {"reason": "signalled", "exit_code": None, "signal": 9}),
        (Outcome(timed_out=True), {"reason": "timeout", "exit_code": None, "signal": None}),
        (Outcome(stopped=True), {"reason": "stopped", "exit_code": None, "signal": None}),
        (PanicError("x"), {"reason": "panic", "exit_code": None, "signal": None, "message": "x"}),
    ],
)
def test_the_record_of_an_end(end: Outcome | Error, record: dict[str, object]) -> None:
    assert ending_of(end) == record


def test_what_a_machine_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "available_memory", lambda: 900 << 20)
    with pytest.raises(NotEnoughMemoryError) as caught:
        check_memory(2048 << 20)
    assert caught.value.message == ("memory: the enclave is to have 2048 MiB, this machine has 900 MiB available")
    check_memory(900 << 20)
    with pytest.raises(NotEnoughMemoryError):
        check_host(QemuCarrier(["qemu"], {}, (11, 1, 0), Accel.TCG), 2048 << 20, None)
    check_host(NitroCarrier(), 2048 << 20, frozenset([4096]))  # its pages and CPUs are set aside already
    check_cpu_list(frozenset(os.sched_getaffinity(0)))
    with pytest.raises(LaunchError, match=r"^CPUs 4096: not among those that this process may use$"):
        check_cpu_list(frozenset([*os.sched_getaffinity(0), 4096]))
