# SPDX-License-Identifier: Apache-2.0
"""The device's slots: what each of the eleven commands does to them, without registers and without machines.

Source: linux: drivers/virt/nitro_enclaves/ne_pci_dev.h for what there is, and the driver for what is used. What a real
device answers to a request that it refuses is not public: the errnos here are our choice (docs/the-nitro-device.md).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from enclavekit.lab.dma import Piece
from enclavekit.lab.ne_registers import Command, Reply
from enclavekit.lab.slots import Answer, DonatedRange, Hypervisor, Slot, SlotState

MEMORY_ALIGNMENT = 2 << 20
FIRST_UID = 0x17A_AB64_B3F7_703D
ADDRESS_END = 1 << 64


@dataclass(slots=True)
class Limits:
    """What is known of nobody, but that EC2 has four enclaves an instance. Changes count from the next command on.

    ``cpus`` is how many the parent has; its CPU 0 is never given away. ``regions`` is told to the driver when it
    makes a slot.
    """

    slots: int = 4
    regions: int = 1024
    cpus: int = 256


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """The command is answered with this errno."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Slots:
    """``find`` tells where a range of the parent's memory is.

    ``on_event``: a slot's state has changed without a command.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        find: Callable[[int, int], list[Piece]],
        on_event: Callable[[], None],
        limits: Limits,
    ) -> None:
        self._hypervisor = hypervisor
        self._find = find
        self._on_event = on_event
        self._limits = limits
        self._slots: dict[int, Slot] = {}
        self._regions: dict[int, list[tuple[int, int]]] = {}
        self._starting: set[int] = set()
        self._ended: set[int] = set()
        self._next_uid = FIRST_UID

    def do(self, command: Command, words: tuple[int, ...]) -> Reply:
        """Every command but ENCLAVE_START, which is answered later. Raises ``Refused``."""
        match command:
            case Command.SLOT_ALLOC:
                return self._allocate()
            case Command.SLOT_COUNT:
                return Reply(slot_count=len(self._slots))
            case Command.NEXT_SLOT:
                return Reply(slot_uid=self._next(words[0]))
            case Command.ENCLAVE_GET_SLOT:
                return Reply(slot_uid=self._of_cid(words[0]).uid)
        slot = self._slot(words[0])
        match command:
            case Command.SLOT_FREE:
                self._free(slot)
            case Command.SLOT_INFO:
                return self._info(slot)
            case Command.ENCLAVE_STOP:
                self._stop(slot)
            case Command.SLOT_ADD_MEM:
                self._add_memory(slot, words[1], words[2])
            case Command.SLOT_ADD_VCPU:
                self._add_cpus(slot, [words[1]])
            case Command.SLOT_ADD_BULK_VCPUS:
                self._add_cpus(slot, self._free_cpus(words[1]))
        return Reply(slot_uid=slot.uid)

    def start(self, words: tuple[int, ...], answer: Answer) -> None:
        """ENCLAVE_START: the hypervisor's answer comes from any thread and is for ``started``. Raises ``Refused``."""
        uid, cid, flags = words
        slot = self._building(uid)
        if not slot.memory or not slot.cpus:
            raise Refused(errno.EINVAL)
        if cid and any(other.cid == cid and other.state is SlotState.RUNNING for other in self._slots.values()):
            raise Refused(errno.EBUSY)
        self._starting.add(uid)
        self._hypervisor.start(slot, cid, flags, answer)

    def started(self, uid: int, rc: int, cid: int, flags: int) -> Reply:
        """What the hypervisor's answer becomes; it may come when the slot is long gone."""
        if uid not in self._starting:
            return Reply(rc=-errno.EINVAL, slot_uid=uid)
        slot = self._slots[uid]
        self._starting.remove(uid)
        if rc < 0:
            self._ended.discard(uid)
            return Reply(rc=rc, slot_uid=uid)
        slot.state, slot.cid, slot.flags = SlotState.RUNNING, cid, flags
        if uid in self._ended:
            self._ended.remove(uid)
            self.ended(uid)
        return Reply(slot_uid=uid, enclave_cid=cid, flags=flags, state=slot.state)

    def ended(self, uid: int) -> None:
        """The enclave has ended by itself. Heard of one that is not there, or has not been running: nothing."""
        if uid in self._starting:
            self._ended.add(uid)  # its answer is still to come
        elif uid in self._slots and self._slots[uid].state is SlotState.RUNNING:
            self._slots[uid].state = SlotState.STOPPED
            self._on_event()

    def clear(self) -> None:
        """All enclaves end, all slots are free."""
        for slot in list(self._slots.values()):
            self._free(slot)

    # Slots

    def _allocate(self) -> Reply:
        if len(self._slots) >= self._limits.slots:
            raise Refused(errno.ENOMEM)
        slot = Slot(self._next_uid)
        self._next_uid += 1
        self._slots[slot.uid], self._regions[slot.uid] = slot, []
        return Reply(slot_uid=slot.uid, mem_regions=self._limits.regions)

    def _next(self, uid: int) -> int:
        """In order of creation; 0 is before the first and after the last."""
        if uid:
            self._slot(uid)
        return next((other for other in self._slots if other > uid), 0)

    def _slot(self, uid: int) -> Slot:
        try:
            return self._slots[uid]
        except KeyError:
            raise Refused(errno.EINVAL) from None

    def _of_cid(self, cid: int) -> Slot:
        for slot in self._slots.values():
            if slot.cid == cid and slot.state is SlotState.RUNNING:
                return slot
        raise Refused(errno.EINVAL)

    def _building(self, uid: int) -> Slot:
        """One that has not been started yet."""
        slot = self._slot(uid)
        if slot.state is not SlotState.INIT or uid in self._starting:
            raise Refused(errno.EBUSY)
        return slot

    def _info(self, slot: Slot) -> Reply:
        return Reply(
            slot_uid=slot.uid,
            enclave_cid=slot.cid,
            mem_regions=len(self._regions[slot.uid]),
            mem_size=sum(size for _, size in self._regions[slot.uid]),
            nr_vcpus=len(slot.cpus),
            flags=slot.flags,
            state=slot.state,
        )

    def _stop(self, slot: Slot) -> None:
        if slot.state is not SlotState.RUNNING:
            raise Refused(errno.EINVAL)
        self._hypervisor.stop(slot)
        slot.state = SlotState.STOPPED

    def _free(self, slot: Slot) -> None:
        self._starting.discard(slot.uid)
        self._ended.discard(slot.uid)
        del self._slots[slot.uid], self._regions[slot.uid]
        self._hypervisor.free(slot)

    # What they are given

    def _add_memory(self, slot: Slot, address: int, size: int) -> None:
        self._building(slot.uid)
        if not size or (address | size) % MEMORY_ALIGNMENT or address + size > ADDRESS_END:
            raise Refused(errno.EINVAL)
        if len(self._regions[slot.uid]) >= self._limits.regions:
            raise Refused(errno.ENOSPC)
        for regions in self._regions.values():
            if any(start < address + size and address < start + length for start, length in regions):
                raise Refused(errno.EBUSY)
        pieces = self._find(address, size)
        if not pieces:
            raise Refused(errno.EFAULT)
        self._regions[slot.uid].append((address, size))
        slot.memory += [DonatedRange(piece.address, piece.size, piece.fd, piece.offset) for piece in pieces]

    def _add_cpus(self, slot: Slot, cpus: list[int]) -> None:
        self._building(slot.uid)
        for cpu in cpus:
            if not 0 < cpu < self._limits.cpus:
                raise Refused(errno.EINVAL)
            if any(cpu in other.cpus for other in self._slots.values()):
                raise Refused(errno.EBUSY)
        slot.cpus += cpus

    def _free_cpus(self, count: int) -> list[int]:
        """The highest numbers first: which CPUs the parent has put aside is not told to a device."""
        taken = {cpu for slot in self._slots.values() for cpu in slot.cpus}
        free = [cpu for cpu in range(self._limits.cpus - 1, 0, -1) if cpu not in taken]
        if not 0 < count <= len(free):
            raise Refused(errno.EINVAL)
        return free[:count]
