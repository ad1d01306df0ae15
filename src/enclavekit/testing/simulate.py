# SPDX-License-Identifier: Apache-2.0
"""An unmodified program against a simulated /dev/nitro_enclaves: its opens and ioctls are answered from outside.

The program gets real descriptors: of a file in memory for the node, and of a pipe for each enclave, so duplicates,
fork, poll and close are the kernel's business. The driver's parameter ``ne_cpus`` can be read, too. What the program
donates is read from its memory when the enclave starts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import select
import signal
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from enclavekit.linux.cpu_pool import NE_CPUS
from enclavekit.linux.cpu_topology import format_cpu_list
from enclavekit.linux.nitro_enclaves import DEVICE, NE_CREATE_VM, NE_MAGIC
from enclavekit.linux.seccomp import SYS_IOCTL, SYS_OPEN, SYS_OPENAT2, Listener, seccomp_notif, spawn
from enclavekit.testing.nitro_device import FileId, SimulatedDevice
from enclavekit.testing.nitro_driver import SimulatedDriver, Slot
from enclavekit.testing.user_memory import ProcessMemory

POOL = Path("/") / NE_CPUS
PATH_MAX = 4096
PAGE = 4096
WARNING = "ordinary memory is taken for huge pages: the driver refuses it with NE_ERR_MEM_NOT_HUGE_PAGE (263)"


class Machines(Protocol):
    """What really runs the enclaves, if anything does."""

    def boot(self, slot: Slot) -> None:
        """Start it with what was donated."""

    def halt(self, slot: Slot) -> None:
        """Stop it."""

    def descriptors(self) -> Sequence[int]:
        """To be polled for ``turn``."""

    def turn(self) -> None:
        """See to what has happened: output, ends."""

    def next_turn_s(self) -> float | None:
        """When to look again, whatever was polled."""


class Simulation:
    """One program, its children, and the driver that they see. ``warn`` is told a sentence, once for each kind."""

    def __init__(
        self,
        driver: SimulatedDriver,
        machines: Machines,
        *,
        strict: bool,
        warn: Callable[[str], None],
    ) -> None:
        self._device = SimulatedDevice(driver)
        self._driver = driver
        self._machines = machines
        self._strict = strict
        self._warn = warn
        self._warned = False

    def run(self, words: Sequence[str]) -> int:
        """Until the program and all of its children have ended: its status, or 128 and its signal's number.

        Errors: ``MissingError``, ``UnsupportedHostError``.
        """
        pid, listener = spawn(words, NE_MAGIC)
        before = {
            signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),  # a terminal's is for the program, too
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: os.kill(pid, number)),
        }
        try:
            self._serve(listener)
            _, status = os.waitpid(pid, 0)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            listener.close()
            self._device.reap()
            self._device.close()
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code

    def _serve(self, listener: Listener) -> None:
        while True:
            poller = select.poll()
            poller.register(listener.fileno(), select.POLLIN)
            for fd in self._device.write_ends():
                poller.register(fd, 0)
            for fd in self._machines.descriptors():
                poller.register(fd, select.POLLIN)
            patience = self._machines.next_turn_s()
            happened = dict(poller.poll(None if patience is None else max(0, int(patience * 1000) + 1)))
            self._device.reap()
            self._machines.turn()
            events = happened.get(listener.fileno(), 0)
            if events & select.POLLIN:
                call = listener.receive()
                if call is not None:
                    self._answer(listener, call)
            elif events:
                return

    def _answer(self, listener: Listener, call: seccomp_notif) -> None:
        try:
            if call.nr == SYS_IOCTL:
                self._ioctl(listener, call)
            else:
                self._open(listener, call, _path_of(call))
        except OSError:  # the thread is gone, or its pointers lead nowhere: the kernel knows what that means
            listener.let_through(call)

    def _open(self, listener: Listener, call: seccomp_notif, path: str) -> None:
        if path not in (str(DEVICE), str(POOL)):
            listener.let_through(call)
            return
        flags = call.args[1] if call.nr == SYS_OPEN else call.args[2]
        if call.nr == SYS_OPENAT2:
            (flags,) = struct.unpack("=Q", ProcessMemory(call.pid).read(call.args[2], 8))
        fd = self._device.open() if path == str(DEVICE) else self._pool()
        listener.give(call, fd, close_on_exec=bool(flags & os.O_CLOEXEC))
        os.close(fd)

    def _pool(self) -> int:
        """What the driver's parameter says: the CPUs, whoever has them now."""
        fd = os.memfd_create("ne_cpus", os.MFD_CLOEXEC)
        cpus = (cpu for threads in self._driver.limits.pool.values() for cpu in threads)
        os.write(fd, format_cpu_list(cpus).encode() + b"\n")
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def _ioctl(self, listener: Listener, call: seccomp_notif) -> None:
        file = _file_of(call.pid, call.args[0])
        if file is None or not self._device.knows(file):
            listener.let_through(call)
            return
        request = call.args[1] & 0xFFFF_FFFF
        memory = ProcessMemory(
            _process_of(call.pid),
            ordinary=not self._strict,
            node=self._driver.limits.node,
            on_ordinary=self._ordinary,
        )
        try:
            value = self._device.ioctl_of(file, request, call.args[2], memory)
        except OSError as error:
            listener.refuse(call, error.errno or errno.EIO)
            return
        if request == NE_CREATE_VM:
            listener.give(call, value, close_on_exec=True)
            os.close(value)
        else:
            listener.answer(call, value)

    def _ordinary(self) -> None:
        if not self._warned:
            self._warned = True
            self._warn(WARNING)


class NoMachines:
    """Nothing runs: an enclave lasts until it is closed, or ``life_s`` seconds."""

    def __init__(self, clock: Callable[[], float], life_s: float | None = None) -> None:
        self._clock = clock
        self._life_s = life_s
        self._ends: list[tuple[float, Slot]] = []

    def boot(self, slot: Slot) -> None:
        """Its time begins."""
        if self._life_s is not None:
            self._ends.append((self._clock() + self._life_s, slot))

    def halt(self, slot: Slot) -> None:
        """Its time is over."""
        self._ends = [(at, other) for at, other in self._ends if other is not slot]

    def descriptors(self) -> Sequence[int]:
        """None."""
        return ()

    def turn(self) -> None:
        """End what has lived long enough."""
        now = self._clock()
        for at, slot in self._ends:
            if at <= now:
                slot.end()
        self._ends = [(at, slot) for at, slot in self._ends if at > now]

    def next_turn_s(self) -> float | None:
        """Until the next end."""
        return min(at for at, _ in self._ends) - self._clock() if self._ends else None


def _path_of(call: seccomp_notif) -> str:
    """What an open names, if that is an absolute path."""
    address = call.args[0] if call.nr == SYS_OPEN else call.args[1]
    return os.fsdecode(posixpath.normpath(_string(ProcessMemory(call.pid), address)))


def _string(memory: ProcessMemory, address: int) -> bytes:
    """A path; empty where there is none, which is no path of ours."""
    found = b""
    with contextlib.suppress(OSError):
        while len(found) < PATH_MAX:
            part = memory.read(address + len(found), PAGE - (address + len(found)) % PAGE)
            text, end, _ = part.partition(b"\0")
            found += text
            if end:
                return found
    return b""


def _file_of(pid: int, fd: int) -> FileId | None:
    try:
        status = Path(f"/proc/{pid}/fd/{fd & 0xFFFF_FFFF}").stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _process_of(thread: int) -> int:
    for line in Path(f"/proc/{thread}/status").read_text().splitlines():
        if line.startswith("Tgid:"):
            return int(line.split()[1])
    raise ProcessLookupError(thread)
