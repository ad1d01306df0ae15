# SPDX-License-Identifier: Apache-2.0
"""A machine: memory, ROM, chips, devices on a bus, and a thread for each vCPU, from its start to its end.

The end comes once, from the guest, from an error or from ``stop`` in any thread: it is noted, all vCPU threads are
kicked out of the guest, and the last of them says that the machine has ended.
"""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from enclavekit.hypervisor.kvm import cpu
from enclavekit.hypervisor.kvm.exits import End, handle, register_report
from enclavekit.linux import kvm_abi as abi
from enclavekit.linux.kvm import Vcpu, Vm

KICK = signal.SIGUSR1
"""Blocked in vCPU threads but while the guest runs, so no handler of the program's is ever called for it."""

WORD_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports ``first`` to ``first + count - 1``, each a byte; ``read`` and ``write`` get the number from ``first``."""

    first: int
    count: int
    read: Callable[[int], int]
    write: Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Window:
    """Registers at guest physical ``address``; ``read`` and ``write`` get offsets."""

    address: int
    size: int
    read: Callable[[int, int], bytes]
    write: Callable[[int, bytes], None]


class DeviceBus:
    """Who answers where. Ports are served one at a time; where nothing is, reads give ones and writes are lost."""

    def __init__(self, ports: Iterable[PortRange], windows: Iterable[Window]) -> None:
        self._ports = {first.first + offset: first for first in ports for offset in range(first.count)}
        self._windows = tuple(windows)
        self._lock = threading.Lock()

    def read_port(self, port: int, size: int) -> bytes:
        """Byte by byte."""
        with self._lock:
            return bytes(self._read_byte(port + offset) for offset in range(size))

    def _read_byte(self, port: int) -> int:
        found = self._ports.get(port)
        return 0xFF if found is None else found.read(port - found.first) & 0xFF

    def write_port(self, port: int, data: bytes) -> None:
        """Byte by byte."""
        with self._lock:
            for offset, value in enumerate(data):
                found = self._ports.get(port + offset)
                if found is not None:
                    found.write(port + offset - found.first, value)

    def locked(self, work: Callable[[], None]) -> None:
        """Do something to a device at ports while no CPU does."""
        with self._lock:
            work()

    def read_memory(self, address: int, size: int) -> bytes:
        """A device's register, all of it in one window."""
        for window in self._windows:
            if window.address <= address and address + size <= window.address + window.size:
                return window.read(address - window.address, size)
        return b"\xff" * size

    def write_memory(self, address: int, data: bytes) -> None:
        """A device's register."""
        for window in self._windows:
            if window.address <= address and address + len(data) <= window.address + window.size:
                window.write(address - window.address, data)
                return


class Machine:
    """Give it memory, then a bus, then ``start``. Methods raise ``OSError`` where KVM refuses."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.end: End | None = None
        self.ended_fd, self._alive = os.pipe2(os.O_CLOEXEC)
        """Hangs up when no vCPU runs any more."""
        self.stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable from the end on: for whoever waits for something in a vCPU's thread."""
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._inside: set[int] = set()
        """Threads that may be kicked."""
        self._cpu_s = 0.0
        self._running = 0
        self._slots = 0
        vm.reserve(cpu.TSS_ADDRESS)
        vm.create_chips()

    def add_memory(self, gpa: int, buffer: mmap.mmap | memoryview, *, readonly: bool = False) -> None:
        """Whole pages."""
        self.vm.set_memory(self._slots, gpa, buffer, readonly=readonly)
        self._slots += 1

    def start(self, cpus: int, bus: DeviceBus, *, host_cpus: frozenset[int] | None = None) -> None:
        """Let all CPUs run; those past the first wait for the guest to start them (INIT, SIPI)."""
        supported = self.vm.supported_cpuid()
        tsc_deadline = bool(self.vm.capability(abi.KVM_CAP_TSC_DEADLINE_TIMER))
        vcpus = []
        for number in range(cpus):
            vcpu = self.vm.create_vcpu(number)
            cpu.set_up(vcpu, number, cpus, supported, tsc_deadline=tsc_deadline)
            vcpu.interruptible_by(KICK)
            vcpus.append(vcpu)
        self._threads = [
            threading.Thread(target=self._run, args=(number, vcpu, bus, host_cpus), name=f"vcpu {number}", daemon=True)
            for number, vcpu in enumerate(vcpus)
        ]
        self._running = len(self._threads)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # which threads inherit
        try:
            for thread in self._threads:
                thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _run(self, number: int, vcpu: Vcpu, bus: DeviceBus, host_cpus: frozenset[int] | None) -> None:
        with self._lock:
            self._inside.add(threading.get_ident())
        try:
            if host_cpus is not None:
                os.sched_setaffinity(0, host_cpus)
            while self.end is None:
                if vcpu.enter():
                    end = handle(vcpu.run, vcpu.shared, bus, lambda: register_report(number, vcpu))
                    if end is not None:
                        self.stop(end)
        except OSError as error:
            self.stop(End("failure", f"KVM: {error.strerror or error}; {register_report(number, vcpu)}"))
        except Exception as error:  # a device's: whoever waits for the machine is told
            self.stop(End("failure", f"vCPU {number}: {type(error).__name__}: {error}"))
        finally:
            with self._lock:
                self._inside.discard(threading.get_ident())
                self._cpu_s += time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)
                self._running -= 1
                if not self._running:
                    os.close(self._alive)

    def stop(self, end: End) -> None:
        """From any thread: the machine ends, if it has not; only the first end counts."""
        with self._lock:
            if self.end is None:
                self.end = end
                os.eventfd_write(self.stop_fd, 1)
            for ident in self._inside - {threading.get_ident()}:
                signal.pthread_kill(ident, KICK)

    @property
    def cpu_s(self) -> float:
        """Seconds that the vCPUs have run, in the guest and for it."""
        with self._lock:
            total = self._cpu_s
            for ident in self._inside:
                with suppress(OSError):
                    total += time.clock_gettime(time.pthread_getcpuclockid(ident))
            return total

    def halt(self) -> None:
        """Stop, and wait for the threads. Not for a vCPU's thread."""
        self.stop(End("closed"))
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Give all back, after ``halt`` where it was started."""
        if not self._threads:
            os.close(self._alive)
        os.close(self.ended_fd)
        os.close(self.stop_fd)
        self.vm.close()
