# SPDX-License-Identifier: Apache-2.0
"""The driver of /dev/nitro_enclaves and the device behind it, simulated: every rule, every error, in their exact order.

Source: linux: drivers/virt/nitro_enclaves/ne_misc_dev.c, ne_pci_dev.h. Where this and the driver differ, this is wrong.
What is known of nobody is a limit here: how many regions and slots a device has. Real devices are silent for 120 s
before a command fails with ETIMEDOUT; a silent one here fails at once.

    driver = SimulatedDriver(Limits(regions=16))
    driver.fail(Command.SLOT_ADD_MEM, errno.ENOMEM)      # the next such command fails
    driver.slots[0].end()                                # the enclave dies: its descriptor polls POLLHUP
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import NoReturn

from enclavekit.errors import (
    DriverError,
    EnclaveMemMinSizeError,
    FullCoresNotUsedError,
    InvalidEnclaveCidError,
    InvalidFlagValueError,
    InvalidMemRegionAddrError,
    InvalidMemRegionSizeError,
    InvalidPageSizeError,
    InvalidVcpuError,
    MemDifferentNumaNodeError,
    MemMaxRegionsError,
    MemNotHugePageError,
    MemRegionAlreadyUsedError,
    NoCpusAvailInPoolError,
    NoMemRegionsAddedError,
    NotInInitStateError,
    NoVcpusAddedError,
    UnalignedMemRegionAddrError,
    VcpuAlreadyUsedError,
    VcpuInvalidCpuCoreError,
    VcpuNotInCpuPoolError,
)
from enclavekit.linux.nitro_enclaves import (
    NE_DEFAULT_MEMORY_REGION,
    NE_EIF_IMAGE,
    NE_ENCLAVE_DEBUG_MODE,
    NE_MIN_ENCLAVE_MEM_SIZE,
    NE_MIN_MEM_REGION_SIZE,
)
from enclavekit.testing.user_memory import Page, UserMemory

FIRST_CID = 16
LOCAL_CID, HOST_CID, PARENT_CID, ANY_CID = 1, 2, 3, 0xFFFF_FFFF
FIRST_SLOT_UID = 0x17A_AB64_B3F7_703D
TASK_SIZE = (1 << 47) - 4096
"""Where a program's half of the addresses ends on x86_64, with four levels of page tables."""


class Command(IntEnum):
    """Commands of the device that the driver uses."""

    ENCLAVE_START = 1
    ENCLAVE_STOP = 3
    SLOT_ALLOC = 4
    SLOT_FREE = 5
    SLOT_ADD_MEM = 6
    SLOT_ADD_VCPU = 7


class State(IntEnum):
    """Of an enclave."""

    INIT = 0
    RUNNING = 2
    STOPPED = 0xFFFF


@dataclass(frozen=True, slots=True)
class Limits:
    """The machine: ``pool`` names the cores that enclaves may have, and each one's CPUs; ``cores`` are all cores.

    ``regions`` and ``slots`` are the device's; ``node`` is the NUMA node of the pool.
    """

    pool: Mapping[int, tuple[int, ...]] = field(
        default_factory=lambda: MappingProxyType({1: (1, 5), 2: (2, 6), 3: (3, 7)})
    )
    cores: int = 4
    threads_per_core: int = 2
    node: int = 0
    regions: int = 1024
    slots: int = 4
    image_load_offset: int = 8 << 20


def refuse(kind: type[DriverError]) -> NoReturn:
    """As the kernel does: with a number."""
    raise OSError(kind.number, kind.name)


def _errno(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


def merge(ranges: list[tuple[int, int]], address: int, size: int) -> None:
    """Add a physical range, to the last one where it follows it (ne_merge_phys_contig_memory_regions)."""
    if address % NE_MIN_MEM_REGION_SIZE or size % NE_MIN_MEM_REGION_SIZE:
        _errno(errno.EINVAL)
    if ranges and sum(ranges[-1]) == address:
        ranges[-1] = (ranges[-1][0], ranges[-1][1] + size)
    else:
        ranges.append((address, size))


class Slot:
    """One enclave as the driver knows it. ``regions`` are address and size as donated; ``ranges`` the physical ones."""

    def __init__(self, driver: SimulatedDriver, uid: int, mm: int) -> None:
        self._driver = driver
        self.uid = uid
        self.mm = mm
        self.state = State.INIT
        self.cid = 0
        self.debug = False
        self.regions: list[tuple[int, int]] = []
        self.ranges: list[tuple[int, int]] = []
        self.vcpus: list[int] = []
        self._cores: dict[int, tuple[int, ...]] = {}
        self.on_end: Callable[[], None] | None = None

    @property
    def memory_size(self) -> int:
        """Bytes, whole pages."""
        return sum(size for _, size in self.ranges)

    def add_vcpu(self, memory: UserMemory, cpu: int) -> int:
        """NE_ADD_VCPU."""
        limits = self._driver.limits
        if self.state is not State.INIT:
            refuse(NotInInitStateError)
        if cpu >= limits.cores * limits.threads_per_core:
            refuse(InvalidVcpuError)
        cpu = self._any_cpu() if cpu == 0 else self._this_cpu(cpu)
        self._check_mm(memory)
        self._driver.command(Command.SLOT_ADD_VCPU)
        self.vcpus.append(cpu)
        return cpu

    def _any_cpu(self) -> int:
        for core in sorted(self._cores):
            for cpu in sorted(self._cores[core]):
                if cpu not in self.vcpus:
                    return cpu
        free = sorted(self._driver.pool)
        if not free:
            refuse(NoCpusAvailInPoolError)
        return min(self._take(free[0]))

    def _this_cpu(self, cpu: int) -> int:
        if cpu in self.vcpus:
            refuse(VcpuAlreadyUsedError)
        if any(cpu in threads for threads in self._cores.values()):
            return cpu
        core = next((core for core, threads in self._driver.pool.items() if cpu in threads), None)
        if core is None:
            refuse(VcpuNotInCpuPoolError)
        self._take(core)
        return cpu

    def _take(self, core: int) -> tuple[int, ...]:
        """The whole core is the enclave's from now on, whatever the device says."""
        if core >= self._driver.limits.cores:
            refuse(VcpuInvalidCpuCoreError)
        self._cores[core] = self._driver.pool.pop(core)
        return self._cores[core]

    def image_load_offset(self, flags: int) -> int:
        """NE_GET_IMAGE_LOAD_INFO."""
        if self.state is not State.INIT:
            refuse(NotInInitStateError)
        if flags != NE_EIF_IMAGE:
            refuse(InvalidFlagValueError)
        return self._driver.limits.image_load_offset

    def set_user_memory_region(self, memory: UserMemory, flags: int, size: int, address: int) -> None:
        """NE_SET_USER_MEMORY_REGION."""
        if flags != NE_DEFAULT_MEMORY_REGION:
            refuse(InvalidFlagValueError)
        if self.state is not State.INIT:
            refuse(NotInInitStateError)
        self._check_mm(memory)
        self._check_region(size, address)
        ranges: list[tuple[int, int]] = []
        if not size:
            _errno(errno.ENOMEM)
        page_of, done = memory.pages(), 0
        while done < size:
            page = page_of(address + done)
            if page is None:
                _errno(errno.EFAULT)
            done += self._check_page(page, address + done)
            merge(ranges, page.physical, page.size)
        if len(self.ranges) + len(ranges) > self._driver.limits.regions:
            refuse(MemMaxRegionsError)
        # The driver has it in its list from here on, whatever the device says of the pages.
        self.regions.append((address, size))
        for found in ranges:
            self._driver.command(Command.SLOT_ADD_MEM)
            self._driver.check_memory(self, *found)
            self.ranges.append(found)

    def _check_region(self, size: int, address: int) -> None:
        if size % NE_MIN_MEM_REGION_SIZE:
            refuse(InvalidMemRegionSizeError)
        if address % NE_MIN_MEM_REGION_SIZE:
            refuse(UnalignedMemRegionAddrError)
        if address + size > TASK_SIZE:
            refuse(InvalidMemRegionAddrError)
        for start, length in self.regions:
            if start < address + size and address < start + length:
                refuse(MemRegionAlreadyUsedError)

    def _check_page(self, page: Page, address: int) -> int:
        if not page.hugetlb:
            refuse(MemNotHugePageError)
        # Of a page that begins before, this is a tail, whose size the kernel takes for that of a small page.
        if page.size % NE_MIN_MEM_REGION_SIZE or address != page.start:
            refuse(InvalidPageSizeError)
        if page.node != self._driver.limits.node:
            refuse(MemDifferentNumaNodeError)
        return page.size

    def start(self, flags: int, cid: int) -> int:
        """NE_START_ENCLAVE; the CID."""
        if flags not in (0, NE_ENCLAVE_DEBUG_MODE):
            refuse(InvalidFlagValueError)
        if cid in (LOCAL_CID, HOST_CID, PARENT_CID) or cid >= ANY_CID:
            refuse(InvalidEnclaveCidError)
        if self.state is not State.INIT:
            refuse(NotInInitStateError)
        if not self.ranges:
            refuse(NoMemRegionsAddedError)
        if self.memory_size < NE_MIN_ENCLAVE_MEM_SIZE:
            refuse(EnclaveMemMinSizeError)
        if not self.vcpus:
            refuse(NoVcpusAddedError)
        if any(cpu not in self.vcpus for threads in self._cores.values() for cpu in threads):
            refuse(FullCoresNotUsedError)
        self._driver.start(self, cid, debug=bool(flags))
        return self.cid

    def _check_mm(self, memory: UserMemory) -> None:
        if memory.mm != self.mm:
            _errno(errno.EIO)

    def end(self) -> None:
        """The enclave has crashed, rebooted or powered off. Twice does no harm."""
        if self.state is State.RUNNING:
            self.state = State.STOPPED
            if self.on_end is not None:
                self.on_end()

    def close(self) -> None:
        """The last descriptor was closed. When the device refuses, CPUs and slot stay where they are: a leak."""
        if self.state is State.RUNNING:
            self._driver.stop(self)
        self._driver.command(Command.SLOT_FREE)
        self._driver.pool.update(self._cores)
        self._cores = {}
        self._driver.slots.remove(self)


class SimulatedDriver:
    """The state of driver and device.

    ``boot`` is called with a slot that is to start, its OSError is the device's; ``halt`` with one that is to stop.

    Not thread-safe. ``slots`` are the enclaves, in order of creation; ``pool`` the cores that are free.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        boot: Callable[[Slot], None] | None = None,
        halt: Callable[[Slot], None] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.slots: list[Slot] = []
        self.pool = dict(self.limits.pool)
        self._boot, self._halt = boot, halt
        self.silent = False
        """The device answers nothing any more."""
        self._faults: list[tuple[Command, int]] = []
        self._next_uid = FIRST_SLOT_UID

    def fail(self, command: Command, number: int) -> None:
        """The next such command fails with that errno; more of them one after another."""
        self._faults.append((command, number))

    def command(self, command: Command) -> None:
        """What the device does with it, as far as that is to answer."""
        if self.silent:
            _errno(errno.ETIMEDOUT)
        for index, (failing, number) in enumerate(self._faults):
            if failing is command:
                del self._faults[index]
                _errno(number)

    def check_memory(self, slot: Slot, address: int, size: int) -> None:
        """SLOT_ADD_MEM: a page is not given twice. Between programs that cannot be told: addresses are their own."""
        for other in self.slots:
            if other.mm == slot.mm and any(
                start < address + size and address < start + length for start, length in other.ranges
            ):
                _errno(errno.EBUSY)

    def create_vm(self, mm: int) -> Slot:
        """NE_CREATE_VM."""
        if not self.pool:
            refuse(NoCpusAvailInPoolError)
        self.command(Command.SLOT_ALLOC)
        if len(self.slots) >= self.limits.slots:
            _errno(errno.ENOMEM)
        slot = Slot(self, self._next_uid, mm)
        self._next_uid += 1
        self.slots.append(slot)
        return slot

    def start(self, slot: Slot, cid: int, *, debug: bool) -> None:
        """ENCLAVE_START: two enclaves cannot have one CID; 0 is for the first one that is free."""
        self.command(Command.ENCLAVE_START)
        taken = {other.cid for other in self.slots if other.state is State.RUNNING}
        if cid in taken:
            _errno(errno.EBUSY)
        slot.cid = cid or next(free for free in range(FIRST_CID, ANY_CID) if free not in taken)
        slot.debug = debug
        if self._boot is not None:
            self._boot(slot)
        slot.state = State.RUNNING

    def stop(self, slot: Slot) -> None:
        """ENCLAVE_STOP."""
        self.command(Command.ENCLAVE_STOP)
        if self._halt is not None:
            self._halt(slot)
        slot.state = State.STOPPED
