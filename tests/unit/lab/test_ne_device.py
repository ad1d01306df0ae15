# SPDX-License-Identifier: Apache-2.0
"""The device as a driver finds it: registers, commands, slots, events, and who is gone."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_rig import MIB, Rig

from enclavekit.lab.ne_device import Fault
from enclavekit.lab.ne_registers import (
    NE_COMMAND,
    NE_ENABLE,
    NE_EVTCNT,
    NE_VERSION,
    REGISTER_BAR,
    Command,
    Reply,
)
from enclavekit.lab.ne_slots import FIRST_UID, Limits
from enclavekit.lab.vfio_user_message import CONFIG_REGION
from enclavekit.lab.vfio_user_message import Command as Message

LIMITS = Limits(slots=2, regions=3, cpus=8)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, LIMITS) as made:
        yield made


def built(rig: Rig, address: int = 64 * MIB, cpu: int = 2) -> int:
    """A slot with memory and a CPU."""
    uid = rig.driver.do(Command.SLOT_ALLOC).slot_uid
    rig.driver.do(Command.SLOT_ADD_MEM, uid, address, 2 * MIB)
    rig.driver.do(Command.SLOT_ADD_VCPU, uid, cpu)
    return uid


def started(rig: Rig, address: int = 64 * MIB, cpu: int = 2) -> int:
    uid = built(rig, address, cpu)
    rig.driver.do(Command.ENCLAVE_START, uid, 0, 0)
    return uid


def refused(rig: Rig, number: int, command: Command, *words: int) -> None:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        rig.driver.do(command, *words)
    assert caught.value.errno == number


def counters(rig: Rig) -> tuple[int, int]:
    """Replies and events so far."""
    value = rig.client.read(REGISTER_BAR, NE_EVTCNT, 4)
    return int.from_bytes(value[:2], "little"), int.from_bytes(value[2:], "little")


def test_identity(rig: Rig) -> None:
    config = rig.client.read(CONFIG_REGION, 0, 256)
    assert config[:12] == bytes.fromhex("0f1d c1e4 0000 1000 01 00 8007")
    assert config[0x2C:0x35] == bytes.fromhex("0f1d c1e4 00000000 40")
    assert config[0x40:0x4C] == bytes.fromhex("11 00 0100 00000000 00080000")
    rig.client.write(CONFIG_REGION, 0, bytes([0xFF] * 256), posted=False)
    assert rig.client.read(CONFIG_REGION, 0, 8) == bytes.fromhex("0f1d c1e4 ffff 1000")
    assert rig.client.read(CONFIG_REGION, 0x42, 2) == bytes.fromhex("01ff")


def test_the_life_of_an_enclave(rig: Rig) -> None:
    allocated = rig.driver.do(Command.SLOT_ALLOC)
    assert allocated == Reply(slot_uid=FIRST_UID, mem_regions=3)
    uid = allocated.slot_uid
    assert rig.driver.do(Command.SLOT_ADD_MEM, uid, 64 * MIB, 4 * MIB).slot_uid == uid
    assert rig.driver.do(Command.SLOT_ADD_MEM, uid, 32 * MIB, 2 * MIB).rc == 0
    rig.driver.do(Command.SLOT_ADD_VCPU, uid, 3)
    rig.driver.do(Command.SLOT_ADD_VCPU, uid, 2)
    assert rig.driver.do(Command.SLOT_INFO, uid) == Reply(slot_uid=uid, mem_regions=2, mem_size=6 * MIB, nr_vcpus=2)
    reply = rig.driver.do(Command.ENCLAVE_START, uid, 0, 1)
    assert reply == Reply(slot_uid=uid, enclave_cid=16, flags=1, state=2)
    assert rig.driver.do(Command.ENCLAVE_GET_SLOT, 16).slot_uid == uid
    assert counters(rig) == (8, 0)
    rig.server.ended(uid)
    rig.driver.wait(1)
    assert counters(rig) == (8, 1)
    assert rig.driver.do(Command.SLOT_INFO, uid).state == 0xFFFF
    refused(rig, errno.EINVAL, Command.ENCLAVE_GET_SLOT, 16)
    refused(rig, errno.EINVAL, Command.ENCLAVE_STOP, uid)
    rig.driver.do(Command.SLOT_FREE, uid)
    assert rig.driver.do(Command.SLOT_COUNT).slot_count == 0
    assert rig.hypervisor.said == [("start", uid), ("free", uid)]


def test_stop(rig: Rig) -> None:
    uid = started(rig)
    rig.driver.do(Command.ENCLAVE_STOP, uid)
    rig.driver.do(Command.SLOT_FREE, uid)
    refused(rig, errno.EINVAL, Command.SLOT_FREE, uid)
    assert rig.hypervisor.said == [("start", uid), ("stop", uid), ("free", uid)]


def test_slots_one_after_the_other(rig: Rig) -> None:
    first, second = (rig.driver.do(Command.SLOT_ALLOC).slot_uid for _ in range(2))
    assert first != second
    refused(rig, errno.ENOMEM, Command.SLOT_ALLOC)
    assert rig.driver.do(Command.SLOT_COUNT).slot_count == 2
    assert [rig.driver.do(Command.NEXT_SLOT, uid).slot_uid for uid in (0, first, second)] == [first, second, 0]
    refused(rig, errno.EINVAL, Command.NEXT_SLOT, 5)


def test_memory_that_is_not_taken(rig: Rig) -> None:
    uid, other = (rig.driver.do(Command.SLOT_ALLOC).slot_uid for _ in range(2))
    add = Command.SLOT_ADD_MEM
    for address, size in ((MIB, 2 * MIB), (0, MIB), (0, 0), ((1 << 64) - 2 * MIB, 4 * MIB)):
        refused(rig, errno.EINVAL, add, uid, address, size)
    refused(rig, errno.EFAULT, add, uid, 256 * MIB, 2 * MIB)
    refused(rig, errno.EFAULT, add, uid, 254 * MIB, 4 * MIB)
    rig.driver.do(add, uid, 64 * MIB, 4 * MIB)
    for slot in (uid, other):
        refused(rig, errno.EBUSY, add, slot, 66 * MIB, 2 * MIB)
        refused(rig, errno.EBUSY, add, slot, 62 * MIB, 4 * MIB)
    rig.driver.do(add, uid, 68 * MIB, 2 * MIB)
    rig.driver.do(add, uid, 62 * MIB, 2 * MIB)
    refused(rig, errno.ENOSPC, add, uid, 10 * MIB, 2 * MIB)
    rig.driver.do(Command.SLOT_FREE, uid)
    rig.driver.do(add, other, 66 * MIB, 2 * MIB)


def test_cpus_that_are_not_taken(rig: Rig) -> None:
    uid, other = (rig.driver.do(Command.SLOT_ALLOC).slot_uid for _ in range(2))
    refused(rig, errno.EINVAL, Command.SLOT_ADD_VCPU, uid, 0)
    refused(rig, errno.EINVAL, Command.SLOT_ADD_VCPU, uid, 8)
    rig.driver.do(Command.SLOT_ADD_VCPU, uid, 7)
    refused(rig, errno.EBUSY, Command.SLOT_ADD_VCPU, uid, 7)
    refused(rig, errno.EBUSY, Command.SLOT_ADD_VCPU, other, 7)
    rig.driver.do(Command.SLOT_ADD_BULK_VCPUS, other, 2)
    refused(rig, errno.EBUSY, Command.SLOT_ADD_VCPU, uid, 6)
    rig.driver.do(Command.SLOT_ADD_VCPU, uid, 4)
    refused(rig, errno.EINVAL, Command.SLOT_ADD_BULK_VCPUS, uid, 4)
    refused(rig, errno.EINVAL, Command.SLOT_ADD_BULK_VCPUS, uid, 0)
    assert rig.driver.do(Command.SLOT_INFO, other).nr_vcpus == 2


def test_start_that_is_refused(rig: Rig) -> None:
    uid = rig.driver.do(Command.SLOT_ALLOC).slot_uid
    refused(rig, errno.EINVAL, Command.ENCLAVE_START, uid, 0, 0)
    rig.driver.do(Command.SLOT_ADD_MEM, uid, 0, 2 * MIB)
    refused(rig, errno.EINVAL, Command.ENCLAVE_START, uid, 0, 0)
    rig.driver.do(Command.SLOT_ADD_VCPU, uid, 1)
    rig.hypervisor.rc = -errno.EBADMSG
    refused(rig, errno.EBADMSG, Command.ENCLAVE_START, uid, 0, 0)
    rig.hypervisor.rc = 0
    rig.driver.do(Command.ENCLAVE_START, uid, 20, 0)
    for command, words in (
        (Command.ENCLAVE_START, (0, 0)), (Command.SLOT_ADD_MEM, (64 * MIB, 2 * MIB)), (Command.SLOT_ADD_VCPU, (2,)),
    ):  # fmt: skip
        refused(rig, errno.EBUSY, command, uid, *words)
    refused(rig, errno.EBUSY, Command.ENCLAVE_START, built(rig), 20, 0)


def test_a_slow_start(rig: Rig) -> None:
    """Other commands go on meanwhile, and then nobody is told of it."""
    rig.hypervisor.hold = True
    uid = built(rig)
    rig.driver.post(Command.ENCLAVE_START, uid, 0, 0)
    assert rig.driver.do(Command.SLOT_INFO, uid).state == 0
    refused(rig, errno.EBUSY, Command.ENCLAVE_START, uid, 0, 0)
    before = counters(rig)
    rig.hypervisor.held.pop()(0, 17)
    rig.settle()
    assert rig.driver.do(Command.SLOT_INFO, uid).state == 2
    assert counters(rig) == (before[0] + 1, 0)
    assert rig.driver.do(Command.SLOT_INFO, uid).enclave_cid == 17


def test_an_end_before_the_answer(rig: Rig) -> None:
    rig.hypervisor.hold = True
    uid = built(rig)
    rig.driver.post(Command.ENCLAVE_START, uid, 0, 0)
    rig.client.read(REGISTER_BAR, 0, 4)
    rig.server.ended(uid)
    rig.settle()
    rig.hypervisor.held.pop()(0, 17)
    rig.driver.wait(0)
    rig.driver.wait(1)
    assert rig.driver.do(Command.SLOT_INFO, uid).state == 0xFFFF


def test_freed_while_it_starts(rig: Rig) -> None:
    """What the driver does after it has waited 120 s."""
    rig.hypervisor.hold = True
    uid = built(rig)
    rig.driver.post(Command.ENCLAVE_START, uid, 0, 0)
    rig.driver.do(Command.SLOT_FREE, uid)
    before = counters(rig)
    rig.hypervisor.held.pop()(0, 17)
    rig.settle()
    assert rig.driver.do(Command.SLOT_COUNT).slot_count == 0
    assert counters(rig) == (before[0] + 1, 0)
    assert rig.hypervisor.said == [("start", uid), ("free", uid)]


def test_faults(rig: Rig) -> None:
    uid = built(rig)
    rig.server.device.faults.append((Command.SLOT_INFO, Fault(errno=errno.EIO)))
    refused(rig, errno.EIO, Command.SLOT_INFO, uid)
    rig.server.device.faults.append((Command.SLOT_INFO, Fault(delay_s=0.01)))
    assert rig.driver.do(Command.SLOT_INFO, uid).nr_vcpus == 1
    rig.server.device.faults.append((Command.ENCLAVE_START, Fault(lost=True)))
    rig.driver.post(Command.ENCLAVE_START, uid, 0, 0)
    rig.driver.do(Command.SLOT_FREE, uid)
    assert rig.hypervisor.said == [("free", uid)]


@pytest.mark.parametrize("how", ["off", "reset", "gone"])
def test_the_parent_leaves(rig: Rig, how: str) -> None:
    running, making = started(rig), built(rig, 128 * MIB, 3)
    if how == "off":
        rig.client.write(REGISTER_BAR, NE_ENABLE, b"\0")
        rig.client.write(REGISTER_BAR, NE_COMMAND, bytes([Command.SLOT_ALLOC, 0, 0, 0]))  # ignored
        rig.client.write(REGISTER_BAR, NE_ENABLE, b"\1")
    elif how == "reset":
        rig.client.ask(Message.DEVICE_RESET)
        assert rig.client.read(REGISTER_BAR, 0, 32) == bytes(32)
        rig.driver.probe()
    else:
        rig.client.transport.close()
        assert rig.gone.wait(20)
        assert rig.server.error is None
    if how != "gone":
        assert rig.driver.do(Command.SLOT_COUNT).slot_count == 0
    assert rig.hypervisor.said[1:] == [("free", running), ("free", making)]


def test_registers_of_any_width(rig: Rig) -> None:
    rig.client.write(REGISTER_BAR, NE_VERSION, b"\x05\x00")
    assert rig.client.read(REGISTER_BAR, NE_VERSION, 2) == b"\1\0"
    rig.client.write(REGISTER_BAR, NE_COMMAND, b"\x08")  # a byte of it is not it
    rig.client.write(REGISTER_BAR, 0x100, b"\xff" * 8)
    assert rig.client.read(REGISTER_BAR, 0x100, 8) == bytes(8)
    rig.client.write(REGISTER_BAR, 0, bytes.fromhex("01 00 0100 08000000"))
    rig.driver.wait(0)
    assert rig.driver.reply() == Reply()
    rig.client.write(REGISTER_BAR, NE_COMMAND, bytes.fromhex("0c000000"))
    rig.driver.wait(0)
    assert rig.driver.reply() == Reply(rc=-errno.EINVAL)
