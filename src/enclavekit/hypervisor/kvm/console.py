# SPDX-License-Identifier: Apache-2.0
"""The serial port's other end: a socket pair, whose reader holds the guest up when it does not read."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from contextlib import suppress

from enclavekit.hypervisor.kvm.serial import Serial
from enclavekit.virtio.loop import Loop


class Console:
    """``outside`` is for whoever reads, and types; ``stop_fd`` becomes readable when nobody needs to be waited for."""

    def __init__(self, stop_fd: int) -> None:
        self.outside, self._inside = socket.socketpair()
        self.outside.setblocking(False)
        self._inside.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._inside, select.POLLOUT)
        self._poll.register(stop_fd, select.POLLIN)
        self._stop_fd = stop_fd
        self._loop = Loop(lambda: False, lambda: None)
        self._loop.watch(self._inside.fileno(), lambda _: self._feed())
        self._serial: Serial | None = None
        self._waiting = False
        """There may be input that the port had no room for."""

    def start(self, serial: Serial, locked: Callable[[Callable[[], None]], None]) -> None:
        """Take input too, in a thread, while ``locked`` keeps the CPUs off the port."""
        self._serial = serial
        self._locked = locked
        self._loop.start("console")

    def send(self, data: bytes) -> None:
        """In a vCPU's thread: all of it, unless the machine ends."""
        while data:
            try:
                data = data[self._inside.send(data) :]
            except BlockingIOError:
                if any(fd == self._stop_fd for fd, _ in self._poll.poll()):
                    return
            except OSError:
                return  # nobody reads any more

    def room(self) -> None:
        """The port has room for input again."""
        if self._waiting:
            self._waiting = False
            self._loop.call(self._feed)

    def _feed(self) -> None:
        """As much as the port takes."""

        def feed() -> None:
            assert self._serial is not None  # noqa: S101 - the loop runs
            while self._serial.room:
                with suppress(OSError):
                    data = self._inside.recv(self._serial.room)
                    if data:
                        self._serial.receive(data)
                        continue
                return
            self._waiting = True

        self._locked(feed)

    def close(self) -> None:
        """When no vCPU runs any more."""
        self._loop.stop()
        self._inside.close()
        self.outside.close()
