# SPDX-License-Identifier: Apache-2.0
"""A parent that says anything to the device, by messages and by registers, while enclaves start and end as they like.

Whatever happens: nothing but our error, no memory or CPU in two slots, each slot freed once, no descriptor left.
``run`` is for the fuzzer, too.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vfio_client import VfioClient

from enclavekit.errors import ProtocolError
from enclavekit.lab.dma import DmaMaps
from enclavekit.lab.interrupts import Interrupts
from enclavekit.lab.ne_device import NeDevice
from enclavekit.lab.ne_registers import NE_COMMAND, NE_ENABLE, NE_SEND_DATA, REGISTER_BAR, REQUESTS, VECTORS, Command
from enclavekit.lab.ne_slots import Limits
from enclavekit.lab.slots import Answer, Slot, SlotState
from enclavekit.lab.vfio_user import VfioUser
from enclavekit.lab.vfio_user_message import DMA_MAP, DMA_UNMAP, HEADER, Flags
from enclavekit.lab.vfio_user_message import Command as Message

MIB = 1 << 20
RAM = 32 * MIB
STEPS = 60
Choose = Callable[[int], int]
"""One of so many."""
WORDS = (0, 1, 2, 3, 4, 5, 7, 9, 0x21, 0x24, 16, 4096, 2 * MIB, 4 * MIB, 16 * MIB, RAM, (1 << 32) - 1, (1 << 64) - MIB)


class Parent:
    """The device in this thread; ``calls`` are what it is to do later."""

    def __init__(self) -> None:
        theirs, ours = socket.socketpair()
        self.calls: list[Callable[[], None]] = []
        self.alive: dict[int, Slot] = {}
        self.freed: set[int] = set()
        self.answers: list[Answer] = []
        memory, interrupts = DmaMaps(), Interrupts(VECTORS)
        self.device = NeDevice(self, memory.find, interrupts.signal, self, Limits(slots=2, regions=3, cpus=4))
        self.server = VfioUser(theirs, self.device, memory, interrupts)
        self.client = VfioClient(ours, self.server.process)
        self.ram = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(self.ram, RAM)

    def call(self, call: Callable[[], None]) -> bool:
        self.calls.append(call)
        return True

    def call_later(self, delay_s: float, call: Callable[[], None]) -> object:
        return self.call(call)

    def start(self, slot: Slot, cid: int, flags: int, answer: Answer) -> None:
        assert slot.state is SlotState.INIT
        assert slot.uid not in self.freed
        assert slot.memory
        assert slot.cpus
        self.alive[slot.uid] = slot
        self.answers.append(answer)

    def stop(self, slot: Slot) -> None:
        assert slot.state is SlotState.RUNNING

    def free(self, slot: Slot) -> None:
        assert slot.uid not in self.freed
        self.freed.add(slot.uid)
        self.alive.pop(slot.uid, None)

    def close(self) -> None:
        self.device.close()
        assert not self.alive
        self.server.close()
        self.client.transport.close()
        os.close(self.ram)


def run(choose: Choose, data: Callable[[int], bytes]) -> None:
    """Until something has broken the protocol, or it is enough."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    parent = Parent()
    try:
        with suppress(ProtocolError):
            parent.client.negotiate()
            parent.client.map(0, RAM, parent.ram)
            parent.client.write(REGISTER_BAR, NE_ENABLE, b"\1")
            hostile = not choose(3)
            for _ in range(STEPS):
                _step(parent, choose, data, hostile=hostile)
                _drain(parent)
                _check(parent)
    finally:
        parent.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def _step(parent: Parent, choose: Choose, data: Callable[[int], bytes], *, hostile: bool) -> None:
    match choose(24):
        case 0 if hostile:
            message = list(Message)[choose(len(Message))]
            flags = (0, 0, Flags.NO_REPLY, Flags.ERROR)[choose(4)]
            parent.client.send(message, data(choose(48)), [parent.ram] * (choose(8) // 6), flags)
        case 1 if hostile:
            parent.client.transport.send(data(choose(40)) or HEADER.pack(0, 13, 16, 0, 0))
            parent.server.process()
        case 2 if hostile:
            address, size = WORDS[choose(len(WORDS))], WORDS[choose(len(WORDS))]
            parent.client.send(Message.DMA_MAP, DMA_MAP.pack(DMA_MAP.size, 3, 0, address, size), [parent.ram])
        case 3:
            parent.client.send(Message.DMA_UNMAP, DMA_UNMAP.pack(DMA_UNMAP.size, 0, 0, RAM))
            parent.client.send(Message.DMA_MAP, DMA_MAP.pack(DMA_MAP.size, 3, 0, 0, RAM), [parent.ram])
        case 4:
            place = choose(4088)
            parent.client.write(REGISTER_BAR, place, data(8)[: 4096 - place])
        case 5 | 6 | 7 if parent.answers:
            parent.answers.pop(choose(len(parent.answers)))((0, 0, -22)[choose(3)], 16 + choose(3))
        case 8:
            parent.device.ended(parent.device._slots._next_uid - 1 - choose(3))
        case 9 | 10 | 11 if parent.calls:
            parent.calls.pop(0)()
        case 12:
            parent.client.write(REGISTER_BAR, NE_ENABLE, bytes([choose(2)]))
        case 13:
            parent.client.send(Message.DEVICE_RESET)
        case 14 | 15:
            parent.client.write(REGISTER_BAR, NE_ENABLE, b"\1")
            _post(parent, Command.SLOT_ALLOC)
            uid = parent.device._slots._next_uid - 1
            _post(parent, Command.SLOT_ADD_MEM, uid, choose(8) * 4 * MIB, 4 * MIB)
            _post(parent, Command.SLOT_ADD_VCPU, uid, 1 + choose(3))
            _post(parent, Command.ENCLAVE_START, uid, 0, choose(2))
        case _:
            parent.client.write(REGISTER_BAR, NE_ENABLE, b"\1")
            _command(parent, choose)


def _post(parent: Parent, command: Command, *words: int) -> None:
    parent.client.write(REGISTER_BAR, NE_SEND_DATA, REQUESTS[command].pack(*words))
    parent.client.write(REGISTER_BAR, NE_COMMAND, command.to_bytes(4, "little"))


def _command(parent: Parent, choose: Choose) -> None:
    """One of the eleven, mostly with words that make sense."""
    command = list(Command)[choose(len(Command))]
    uid = parent.device._slots._next_uid - 1 - choose(3)
    words = {
        Command.SLOT_ALLOC: [],
        Command.SLOT_COUNT: [],
        Command.SLOT_ADD_MEM: [uid, choose(20) * 2 * MIB, choose(3) * 2 * MIB],
        Command.SLOT_ADD_VCPU: [uid, choose(5)],
        Command.SLOT_ADD_BULK_VCPUS: [uid, choose(3)],
        Command.ENCLAVE_START: [uid, (0, 16, 17)[choose(3)], choose(2)],
        Command.ENCLAVE_GET_SLOT: [16 + choose(3)],
    }.get(command, [uid])
    if words and not choose(16):
        words[choose(len(words))] = WORDS[choose(len(WORDS))] & 0xFFFF_FFFF
    _post(parent, command, *words)


def _drain(parent: Parent) -> None:
    """Replies are not looked at."""
    parent.client.transport.setblocking(False)
    with suppress(BlockingIOError):
        while parent.client.transport.recv(1 << 16):
            pass
    parent.client.transport.settimeout(20)


def _check(parent: Parent) -> None:
    slots = list(parent.device._slots._slots.values())
    assert len(slots) <= 2
    cpus = [cpu for slot in slots for cpu in slot.cpus]
    assert len(cpus) == len(set(cpus))
    assert all(0 < cpu < 4 for cpu in cpus)
    ranges = sorted((one.address, one.address + one.size) for slot in slots for one in slot.memory)
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert not parent.freed & {slot.uid for slot in slots}


@pytest.fixture(autouse=True)
def _no_garbage() -> None:
    """What other tests left must not be closed while descriptors are counted here."""
    gc.collect()


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False))
def test_whatever_a_parent_does(random: Random) -> None:
    run(random.randrange, random.randbytes)
