# SPDX-License-Identifier: Apache-2.0
"""The listening socket where the system runs out of file descriptors. The rest: test_vsock_backend.py."""

from __future__ import annotations

import os
import resource
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from enclavekit.virtio.host_sockets import Listener, ParentRoute
from enclavekit.virtio.loop import Loop, LoopTimer
from enclavekit.virtio.vsock import VsockDevice
from enclavekit.virtio.vsock_packet import Address


class StillLoop(Loop):
    """A loop that is turned by hand, and keeps its timers for the test."""

    def __init__(self) -> None:
        super().__init__(lambda: False, lambda: None)
        self.delayed: list[tuple[float, LoopTimer]] = []
        self.watched: dict[int, Callable[[int], None]] = {}

    def watch(self, fd: int, callback: Callable[[int], None] | None, events: int = select.EPOLLIN) -> None:
        assert callback is not None
        self.watched[fd] = callback
        super().watch(fd, callback, events)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> LoopTimer:
        self.delayed.append((delay_s, LoopTimer(call)))
        return self.delayed[-1][1]


@contextmanager
def no_file_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.dup(0)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def loop() -> Iterator[StillLoop]:
    loop = StillLoop()
    yield loop
    loop.stop()


def test_clients_wait_until_there_are_file_descriptors_again(loop: StillLoop, tmp_path: Path) -> None:
    listener = Listener(loop, VsockDevice(16, {}, loop.call_later), tmp_path)
    (accept,) = loop.watched.values()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "vsock.sock"))
        with no_file_descriptors():
            accept(select.EPOLLIN)
            accept(select.EPOLLIN)
        ((delay_s, timer),) = loop.delayed
        assert delay_s == 0.1
        assert len(loop.watched) == 1
        timer.fire()
        assert len(loop.watched) == 2
    listener.close()


def test_a_retry_after_the_end_does_nothing(loop: StillLoop, tmp_path: Path) -> None:
    listener = Listener(loop, VsockDevice(16, {}, loop.call_later), tmp_path)
    (accept,) = loop.watched.values()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "vsock.sock"))
        with no_file_descriptors():
            accept(select.EPOLLIN)
    listener.close()
    loop._close_retired()
    loop.delayed[0][1].fire()
    assert len(loop.watched) == 1


def test_a_guest_that_dials_without_file_descriptors_is_refused(loop: StillLoop, tmp_path: Path) -> None:
    route = ParentRoute(loop, enclave_id="x", directory=tmp_path, parent_directory=None, services={})
    with no_file_descriptors():
        assert route.dial(Address(16, 1), 5000) is None


def test_the_directory_may_be_gone_at_the_end(loop: StillLoop, tmp_path: Path) -> None:
    directory = tmp_path / "enclave"
    directory.mkdir()
    listener = Listener(loop, VsockDevice(16, {}, loop.call_later), directory)
    (directory / "vsock.sock").unlink()
    directory.rmdir()
    listener.close()
    assert list(tmp_path.iterdir()) == []
