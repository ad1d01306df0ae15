# SPDX-License-Identifier: Apache-2.0
"""virtio-mmio registers, driven as Linux drives them, over the real vsock device in its thread."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from enclavekit.errors import EnclaveRefusedError
from enclavekit.testing.virtio import MockQueue, MockVsockDriver
from enclavekit.virtio.backend import VsockBackend
from enclavekit.virtio.loop import Loop
from enclavekit.virtio.mmio import MAX_QUEUE_SIZE, MmioTransport, Register, Status
from enclavekit.virtio.streams import HEARTBEAT, HEARTBEAT_PORT
from enclavekit.virtio.vhost_user import Device
from enclavekit.virtio.vsock_packet import Header, Op

CID = 21
TIMEOUT_S = 20.0
READY = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
VERSION_1_BANK = 1


class Rig:
    """The device, its registers and a driver over plain memory."""

    def __init__(self, directory: Path) -> None:
        self.driver = MockVsockDriver(bytearray(1 << 20), CID)
        self.heartbeats = 0
        self.backend = VsockBackend(
            transport=self._attach,
            guest_cid=CID,
            enclave_id="0123abcd",
            directory=directory,
            parent_directory=None,
            on_heartbeat=self._heard,
        )
        self.backend.start()

    def _attach(self, device: Device, loop: Loop, on_end: Callable[[], None]) -> MmioTransport:
        self.on_end = on_end
        self.mmio = MmioTransport(19, ("rx", "tx", "event"), self.driver.memory, device, loop)
        return self.mmio

    def _heard(self) -> None:
        self.heartbeats += 1

    def read(self, register: int) -> int:
        return int.from_bytes(self.mmio.read(register, 4), "little")

    def write(self, register: int, value: int) -> None:
        self.mmio.write(register, value.to_bytes(4, "little"))

    def features(self) -> int:
        found = 0
        for bank in (0, 1):
            self.write(Register.DEVICE_FEATURES_SELECT, bank)
            found |= self.read(Register.DEVICE_FEATURES) << 32 * bank
        return found

    def accept(self, features: int) -> None:
        for bank in (0, 1):
            self.write(Register.DRIVER_FEATURES_SELECT, bank)
            self.write(Register.DRIVER_FEATURES, features >> 32 * bank & 0xFFFFFFFF)
        self.write(Register.STATUS, READY)

    def queue(self, index: int, queue: MockQueue, size: int | None = None) -> None:
        self.write(Register.QUEUE_SELECT, index)
        self.write(Register.QUEUE_SIZE, queue.size if size is None else size)
        for register, gpa in (
            (Register.QUEUE_DESCRIPTORS_LOW, queue.gpa),
            (Register.QUEUE_AVAILABLE_LOW, queue.available_gpa),
            (Register.QUEUE_USED_LOW, queue.used_gpa),
        ):
            self.write(register, gpa & 0xFFFFFFFF)
            self.write(register + 4, gpa >> 32)
        self.write(Register.QUEUE_READY, 1)

    def boot(self) -> None:
        self.write(Register.STATUS, 0)
        self.write(Register.STATUS, Status.ACKNOWLEDGE | Status.DRIVER)
        self.accept(self.features())
        self.queue(0, self.driver.rx)
        self.queue(1, self.driver.tx)
        self.driver.fill_rx()
        self.write(Register.STATUS, READY | Status.DRIVER_OK)

    def interrupt(self) -> None:
        assert select.select([self.mmio.interrupt_fd], [], [], TIMEOUT_S)[0], "no interrupt"
        os.eventfd_read(self.mmio.interrupt_fd)
        assert self.read(Register.INTERRUPT_STATUS) == 1
        self.write(Register.INTERRUPT_ACK, 1)

    def receive(self) -> list[tuple[Header, bytes]]:
        """Used tx buffers interrupt too, so the first interrupt may bring nothing."""
        while True:
            self.interrupt()
            if packets := self.driver.receive():
                return packets

    def receive_op(self) -> int:
        ((header, _),) = self.receive()
        return header.op

    def close(self) -> None:
        self.backend.close()
        self.mmio.close_fds()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def test_what_a_driver_looks_for_first(rig: Rig) -> None:
    assert [rig.read(offset) for offset in (0, 4, 8)] == [0x74726976, 2, 19]
    assert rig.features() == 1 << 32 | 1 << 28
    assert rig.mmio.read(0x100, 4) + rig.mmio.read(0x104, 4) == CID.to_bytes(8, "little")
    assert rig.mmio.read(0x106, 4) == bytes(4)
    assert (rig.read(Register.SHARED_LENGTH_LOW), rig.read(Register.CONFIG_GENERATION)) == (0xFFFFFFFF, 0)
    for index, size in ((0, MAX_QUEUE_SIZE), (2, MAX_QUEUE_SIZE), (3, 0), (0xFFFFFFFF, 0)):
        rig.write(Register.QUEUE_SELECT, index)
        assert rig.read(Register.QUEUE_SIZE_MAX) == size


def test_registers_are_read_whole(rig: Rig) -> None:
    assert rig.mmio.read(0, 1) == b"\0"
    assert rig.mmio.read(0, 8) == bytes(8)
    rig.mmio.write(Register.STATUS, b"\x01")
    assert rig.read(Register.STATUS) == 0


@pytest.mark.parametrize("features", [0, 1 << 28, 1 << 32 | 1 << 35])
def test_features_that_are_not_good_are_not_confirmed(rig: Rig, features: int) -> None:
    rig.accept(features)
    assert rig.read(Register.STATUS) == Status.ACKNOWLEDGE | Status.DRIVER


def test_a_heartbeat_by_kicks_and_interrupts(rig: Rig) -> None:
    rig.boot()
    rig.driver.send(Op.REQUEST, 5000, HEARTBEAT_PORT)
    rig.write(Register.QUEUE_NOTIFY, 1)
    assert rig.receive_op() == Op.RESPONSE
    rig.driver.send(Op.RW, 5000, HEARTBEAT_PORT, bytes([HEARTBEAT]))
    os.eventfd_write(rig.mmio.kick_fds[1], 1)  # as an ioeventfd does
    header, data = rig.receive()[0]
    assert (header.op, data) == (Op.RW, bytes([HEARTBEAT]))
    assert rig.heartbeats == 1


def test_a_reset_ends_connections_and_lets_it_boot_again(rig: Rig) -> None:
    for _ in range(3):
        rig.boot()
        rig.driver.send(Op.REQUEST, 5000, HEARTBEAT_PORT)
        rig.write(Register.QUEUE_NOTIFY, 1)
        assert rig.receive_op() == Op.RESPONSE
        rig.write(Register.STATUS, 0)
        assert rig.backend.statistics()[0] == 0
        assert rig.read(Register.INTERRUPT_STATUS) == 0
        rig.driver.rx.reset()
        rig.driver.tx.reset()


@pytest.mark.parametrize("size", [0, 3, MAX_QUEUE_SIZE * 2])
def test_a_queue_of_no_size_asks_for_a_reset(rig: Rig, size: int) -> None:
    rig.accept(rig.features())
    rig.queue(0, rig.driver.rx, size)
    rig.write(Register.STATUS, READY | Status.DRIVER_OK)
    assert rig.read(Register.STATUS) & Status.NEEDS_RESET
    rig.boot()
    assert rig.read(Register.STATUS) == READY | Status.DRIVER_OK


def test_a_queue_outside_of_memory_asks_for_a_reset(rig: Rig) -> None:
    rig.accept(rig.features())
    queue = MockQueue("rx", memoryview(bytearray(1 << 20)), 0)
    queue.gpa = 1 << 40
    rig.queue(0, queue)
    rig.write(Register.STATUS, READY | Status.DRIVER_OK)
    assert rig.read(Register.STATUS) & Status.NEEDS_RESET


def test_a_queue_that_is_ready_is_not_changed(rig: Rig) -> None:
    rig.boot()
    rig.write(Register.QUEUE_SELECT, 1)
    rig.write(Register.QUEUE_SIZE, 3)
    rig.driver.send(Op.REQUEST, 5000, HEARTBEAT_PORT)
    rig.write(Register.QUEUE_NOTIFY, 1)
    assert rig.receive_op() == Op.RESPONSE


def test_registers_of_a_device_that_has_ended(rig: Rig) -> None:
    rig.boot()
    rig.backend.close()
    rig.write(Register.STATUS, 0)
    assert rig.read(Register.STATUS) == 0
    rig.boot()
    rig.write(Register.QUEUE_NOTIFY, 1)


def test_the_host_dials_a_guest_that_refuses(rig: Rig) -> None:
    rig.boot()
    with ThreadPoolExecutor(1) as pool:
        dialled = pool.submit(rig.backend.connect, 80, TIMEOUT_S)
        ((header, _),) = rig.receive()
        assert (header.op, header.dst_port) == (Op.REQUEST, 80)
        rig.driver.send(Op.RST, 80, header.src_port)
        rig.write(Register.QUEUE_NOTIFY, 1)
        with pytest.raises(EnclaveRefusedError):
            dialled.result(TIMEOUT_S)


def test_any_access_does_no_harm(rig: Rig) -> None:
    for offset in range(0, 0x200, 2):
        for size in (1, 2, 4, 8):
            assert len(rig.mmio.read(offset, size)) == size
            rig.mmio.write(offset, b"\xff" * size)
    rig.boot()
