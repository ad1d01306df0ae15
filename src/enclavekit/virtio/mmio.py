# SPDX-License-Identifier: Apache-2.0
"""virtio-mmio: a device's registers in a window of guest physical memory, for a monitor of our own.

Source: virtio 1.2 §4.2.2 and §4.2.3; linux: drivers/virtio/virtio_mmio.c. Only the current version (2) is offered.

The monitor's CPU threads call ``read`` and ``write``; the device lives in the thread of its loop, which is where its
queues are started and stopped: a write that does so waits for it. Kicks arrive there by eventfds that the monitor binds
to the notify register, and interrupts leave by one that it binds to an interrupt line: neither passes through here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from enum import IntEnum, IntFlag
from typing import Protocol

from enclavekit.errors import VirtqueueError
from enclavekit.virtio.memory import GuestMemory
from enclavekit.virtio.queue import (
    VIRTIO_F_INDIRECT_DESC,
    Virtqueue,
    available_size,
    descriptors_size,
    used_size,
)
from enclavekit.virtio.vhost_user import Device

WINDOW_SIZE = 0x1000
MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR = int.from_bytes(b"EKIT", "little")
MAX_QUEUE_SIZE = 256
VIRTIO_F_VERSION_1 = 1 << 32
CONFIG = 0x100
"""The device's configuration space starts here."""

USED_RING = 1
"""In the interrupt status: a queue has news."""


class Register(IntEnum):
    """Offsets in the window, 32 bits each."""

    MAGIC = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SELECT = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SELECT = 0x024
    QUEUE_SELECT = 0x030
    QUEUE_SIZE_MAX = 0x034
    QUEUE_SIZE = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESCRIPTORS_LOW = 0x080
    QUEUE_DESCRIPTORS_HIGH = 0x084
    QUEUE_AVAILABLE_LOW = 0x090
    QUEUE_AVAILABLE_HIGH = 0x094
    QUEUE_USED_LOW = 0x0A0
    QUEUE_USED_HIGH = 0x0A4
    SHARED_LENGTH_LOW = 0x0B0
    SHARED_LENGTH_HIGH = 0x0B4
    CONFIG_GENERATION = 0x0FC


class Status(IntFlag):
    """How far the driver is (virtio 1.2 §2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


ADDRESS_REGISTERS = {
    Register.QUEUE_DESCRIPTORS_LOW: ("descriptors", 0),
    Register.QUEUE_DESCRIPTORS_HIGH: ("descriptors", 32),
    Register.QUEUE_AVAILABLE_LOW: ("available", 0),
    Register.QUEUE_AVAILABLE_HIGH: ("available", 32),
    Register.QUEUE_USED_LOW: ("used", 0),
    Register.QUEUE_USED_HIGH: ("used", 32),
}
LOW_HALF = 0xFFFFFFFF


class Loop(Protocol):
    """The device's thread."""

    def watch(self, fd: int, callback: Callable[[int], None] | None) -> None:
        """Call back when the fd becomes readable."""

    def forget(self, fd: int) -> None:
        """No longer."""

    def call(self, call: Callable[[], None]) -> bool:
        """From any thread: call soon in its own. False once it has ended."""


class _Queue:
    """What the driver has said about a queue."""

    def __init__(self) -> None:
        self.size = 0
        self.ready = False
        self.descriptors = self.available = self.used = 0
        self.running: Virtqueue | None = None


class MmioTransport:
    """The registers of one device. ``close`` stops its queues and closes the eventfds.

    ``names`` are those of all queues that the driver sees; those past the device's own are taken and left alone.
    """

    def __init__(self, device_id: int, names: Sequence[str], memory: GuestMemory, device: Device, loop: Loop) -> None:
        self._device_id = device_id
        self._names = names
        self._memory = memory
        self._device = device
        self._loop = loop
        self._lock = threading.Lock()
        """Of the registers: CPUs access them one after the other."""
        self._status = Status(0)
        self._queues = [_Queue() for _ in names]
        self._selected = 0
        self._device_bank = self._driver_bank = 0
        self._driver_features = 0
        self._interrupt_lock = threading.Lock()
        self._interrupt_status = 0
        self.interrupt_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """To be bound to the device's interrupt line."""
        self.kick_fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in names]
        """Each to be bound to a write of its number to QUEUE_NOTIFY."""
        self._closed = False

    def start(self) -> None:
        """Wait for kicks; before the loop starts."""
        for fd in self.kick_fds[: self._device.queue_count]:
            self._loop.watch(fd, None)  # being woken is enough: the device looks at its queues

    def close(self) -> None:
        """In the loop's thread. The CPUs may run on and find a device that is dead. Twice does no harm."""
        if self._closed:
            return
        self._closed = True
        self._stop_queues()
        for fd in self.kick_fds[: self._device.queue_count]:
            self._loop.forget(fd)

    def close_fds(self) -> None:
        """When neither the loop nor a CPU runs any more; lets go of the guest's memory too."""
        self._memory = GuestMemory(())
        for fd in (self.interrupt_fd, *self.kick_fds):
            os.close(fd)
        self.kick_fds = []

    # Registers

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset`` of the window: registers only whole; what is not there reads as 0."""
        if offset >= CONFIG:
            return self._device.config[offset - CONFIG :][:size].ljust(size, b"\0")
        if size != 4:
            return bytes(size)
        with self._lock:
            return (self._read(offset) & LOW_HALF).to_bytes(4, "little")

    def _read(self, offset: int) -> int:  # noqa: PLR0911 - a register each
        queue = self._queue
        match offset:
            case Register.MAGIC:
                return MAGIC
            case Register.VERSION:
                return VERSION
            case Register.DEVICE_ID:
                return self._device_id
            case Register.VENDOR_ID:
                return VENDOR
            case Register.DEVICE_FEATURES:
                return self._device.features >> 32 * self._device_bank if self._device_bank < 2 else 0
            case Register.QUEUE_SIZE_MAX:
                return MAX_QUEUE_SIZE if queue is not None else 0
            case Register.QUEUE_READY:
                return int(queue is not None and queue.ready)
            case Register.INTERRUPT_STATUS:
                return self._interrupt_status
            case Register.STATUS:
                return self._status
            case Register.SHARED_LENGTH_LOW | Register.SHARED_LENGTH_HIGH:
                return LOW_HALF  # no shared memory
            case _:
                return 0

    def write(self, offset: int, data: bytes) -> None:
        """Bytes at ``offset``. What makes no sense changes nothing: the guest harms itself alone."""
        if offset >= CONFIG or len(data) != 4:
            return
        with self._lock:
            self._write(offset, int.from_bytes(data, "little"))

    def _write(self, offset: int, value: int) -> None:
        match offset:
            case Register.DEVICE_FEATURES_SELECT:
                self._device_bank = value
            case Register.DRIVER_FEATURES_SELECT:
                self._driver_bank = value
            case Register.DRIVER_FEATURES:
                if self._driver_bank < 2 and not self._status & Status.FEATURES_OK:
                    shift = 32 * self._driver_bank
                    self._driver_features = self._driver_features & ~(LOW_HALF << shift) | value << shift
            case Register.QUEUE_SELECT:
                self._selected = value
            case Register.QUEUE_NOTIFY:
                if value < len(self.kick_fds):  # where no ioeventfd takes it
                    os.eventfd_write(self.kick_fds[value], 1)
            case Register.INTERRUPT_ACK:
                with self._interrupt_lock:
                    self._interrupt_status &= ~value
            case Register.STATUS:
                self._set_status(Status(value & 0xFF))
            case _:
                self._configure_queue(offset, value)

    @property
    def _queue(self) -> _Queue | None:
        return self._queues[self._selected] if self._selected < len(self._queues) else None

    def _configure_queue(self, offset: int, value: int) -> None:
        queue = self._queue
        if queue is None:
            return
        if offset == Register.QUEUE_READY:
            queue.ready = bool(value & 1)
            self._in_loop(self._update_queues)
        elif queue.ready:
            return
        elif offset == Register.QUEUE_SIZE:
            queue.size = value
        elif offset in ADDRESS_REGISTERS:
            name, shift = ADDRESS_REGISTERS[Register(offset)]
            setattr(queue, name, getattr(queue, name) & ~(LOW_HALF << shift) | value << shift)

    def _set_status(self, status: Status) -> None:
        if not status:
            self._in_loop(self._stop_queues)
            self._status = status
            self._driver_features = 0
            self._queues = [_Queue() for _ in self._names]
            with self._interrupt_lock:
                self._interrupt_status = 0
            return
        if status & Status.FEATURES_OK and not self._status & Status.FEATURES_OK and not self._features_are_good():
            status &= ~Status.FEATURES_OK
        self._status = status | self._status & Status.NEEDS_RESET
        self._in_loop(self._update_queues)

    def _features_are_good(self) -> bool:
        return bool(self._driver_features & VIRTIO_F_VERSION_1) and not self._driver_features & ~self._device.features

    # In the loop's thread

    def _in_loop(self, work: Callable[[], None]) -> None:
        """Have it done there and wait; nothing happens once the device has ended."""
        done: Future[None] = Future()

        def call() -> None:
            try:
                if not self._closed:
                    work()
            finally:
                done.set_result(None)

        if self._loop.call(call):
            done.result()

    def _update_queues(self) -> None:
        """Run those of which everything is known, stop the others."""
        live = Status.DRIVER_OK in self._status and Status.FEATURES_OK in self._status
        for index, queue in enumerate(self._queues[: self._device.queue_count]):
            if live and queue.ready and queue.running is None:
                try:
                    queue.running = self._make(index, queue)
                except VirtqueueError:
                    self._status |= Status.NEEDS_RESET
                    continue
                self._device.start(index, queue.running)
            elif queue.running is not None and not (live and queue.ready):
                self._device.stop(index)
                queue.running = None

    def _make(self, index: int, queue: _Queue) -> Virtqueue:
        size, memory = queue.size, self._memory
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise VirtqueueError(
                f"{self._names[index]} queue: size {size} is not a power of two up to {MAX_QUEUE_SIZE}"
            )
        return Virtqueue(
            self._names[index],
            memory,
            size,
            descriptors=memory.view(queue.descriptors, descriptors_size(size)),
            available=memory.view(queue.available, available_size(size)),
            used=memory.view(queue.used, used_size(size)),
            indirect=bool(self._driver_features & VIRTIO_F_INDIRECT_DESC),
            interrupt=self._interrupt,
        )

    def _stop_queues(self) -> None:
        for index, queue in enumerate(self._queues[: self._device.queue_count]):
            if queue.running is not None:
                self._device.stop(index)
                queue.running = None

    def _interrupt(self) -> None:
        """The cause first, then the line."""
        with self._interrupt_lock:
            self._interrupt_status |= USED_RING
        os.eventfd_write(self.interrupt_fd, 1)
