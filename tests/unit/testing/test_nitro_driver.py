# SPDX-License-Identifier: Apache-2.0
"""The simulated driver: each of its errors by the calls that any program makes, their order, and how enclaves end."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from enclavekit.errors import DriverError
from enclavekit.linux import nitro_enclaves as ne
from enclavekit.testing.nitro_device import SimulatedDevice, file_id
from enclavekit.testing.nitro_driver import Command, Limits, SimulatedDriver, State, merge
from enclavekit.testing.user_memory import Page, ProcessMemory

MIB = 1 << 20
HUGE = 2 * MIB
BASE = 0x7F00_0000_0000
GIB = 1 << 30


class LaidOut(ProcessMemory):
    """Arguments are where they are; donated memory is only a table: huge pages, but for ``odd``."""

    def __init__(self) -> None:
        super().__init__(os.getpid())
        self.odd: dict[int, Page | None] = {}
        self.page_size = HUGE
        self.parent = self.mm
        self.now = self.mm

    @property
    def mm(self) -> int:
        return getattr(self, "now", os.getpid())

    def pages(self) -> Callable[[int], Page | None]:
        def page(address: int) -> Page | None:
            first = address & -self.page_size
            return self.odd.get(address, Page(first, self.page_size, True, first))

        return page


class Rig:
    """A driver, and one enclave of it."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.memory = LaidOut()
        self.driver = SimulatedDriver(limits)
        self.device = SimulatedDevice(self.driver, self.memory)
        self.fd = self.create()

    def create(self) -> int:
        return ne.create_vm(self.device)[0]

    @property
    def state(self) -> State:
        return self.driver.slots[0].state

    def cpu(self, number: int = 0) -> int:
        return ne.add_vcpu(self.device, self.fd, number)

    def memory_region(self, address: int = BASE, size: int = 64 * MIB, flags: int = 0) -> None:
        ne.set_user_memory_region(self.device, self.fd, address, size, flags)

    def offset(self, flags: int = 1) -> int:
        return ne.image_load_offset(self.device, self.fd, flags)

    def start(self, cid: int = 0, flags: int = 0) -> int:
        return ne.start_enclave(self.device, self.fd, cid, flags)

    def ready(self) -> None:
        self.memory_region()
        self.cpu()
        self.cpu()

    def started(self) -> None:
        self.ready()
        self.start()

    def events(self) -> int:
        poller = select.poll()
        poller.register(self.fd, select.POLLIN | select.POLLOUT)
        return dict(poller.poll(0)).get(self.fd, 0)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.device.close()


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(DriverError) as caught:
        yield
    assert caught.value.number == number


def small_pages(rig: Rig) -> None:
    rig.memory.odd[BASE + HUGE] = Page(BASE + HUGE, 4096, False, 0)
    rig.memory_region()


def other_node(rig: Rig) -> None:
    rig.memory.odd[BASE] = Page(BASE, HUGE, True, 0, node=1)
    rig.memory_region()


def no_pool_left(rig: Rig) -> None:
    for _ in range(7):
        rig.cpu()


def tail_page(rig: Rig) -> None:
    rig.memory.page_size = GIB
    rig.memory_region(BASE + HUGE)


def small_hugetlb(rig: Rig) -> None:
    rig.memory.page_size = 64 * 1024
    rig.memory_region()


def twice(rig: Rig) -> None:
    rig.cpu(1)
    rig.cpu(1)


def overlap(rig: Rig) -> None:
    rig.memory_region(BASE, 4 * MIB)
    rig.memory_region(BASE + HUGE, 4 * MIB)


def too_many_regions(rig: Rig) -> None:
    for number in range(1025):
        rig.memory_region(BASE + 2 * number * HUGE, HUGE)


def half_a_core(rig: Rig) -> None:
    rig.memory_region()
    rig.cpu()
    rig.start()


def little_memory(rig: Rig) -> None:
    rig.memory_region(BASE, 62 * MIB)
    rig.cpu()
    rig.cpu()
    rig.start()


def no_cpus(rig: Rig) -> None:
    rig.memory_region()
    rig.start()


def again(rig: Rig) -> None:
    rig.started()
    rig.start()


ROWS: list[tuple[int, Callable[[Rig], object]]] = [
    (256, twice),
    (257, lambda rig: rig.cpu(4)),
    (259, lambda rig: rig.memory_region(size=HUGE + 4096)),
    (260, lambda rig: rig.memory_region(address=1 << 63)),
    (260, lambda rig: rig.memory_region(address=(1 << 64) - HUGE, size=4 * MIB)),
    (261, lambda rig: rig.memory_region(address=BASE + 4096)),
    (262, overlap),
    (263, small_pages),
    (264, other_node),
    (265, too_many_regions),
    (266, lambda rig: rig.start()),
    (267, no_cpus),
    (268, little_memory),
    (269, half_a_core),
    (270, again),
    (271, lambda rig: rig.cpu(8)),
    (272, no_pool_left),
    (273, tail_page),
    (273, small_hugetlb),
    (274, lambda rig: rig.offset(0)),
    (274, lambda rig: rig.offset(2)),
    (274, lambda rig: rig.memory_region(flags=1)),
    (274, lambda rig: rig.start(flags=2)),
    *((275, lambda rig, cid=cid: rig.start(cid)) for cid in (1, 2, 3, 0xFFFF_FFFF, 1 << 32)),
]


@pytest.mark.parametrize(("number", "act"), ROWS)
def test_each_error(rig: Rig, number: int, act: Callable[[Rig], object]) -> None:
    with refused(number):
        act(rig)


def test_a_cpu_that_another_enclave_has(rig: Rig) -> None:
    rig.cpu(1)
    rig.fd = rig.create()
    with refused(257):
        rig.cpu(5)


def test_a_core_that_the_driver_does_not_know() -> None:
    rig = Rig(Limits(pool={9: (1, 5)}))
    with refused(258):
        rig.cpu()
    rig.device.close()


def test_no_pool() -> None:
    with refused(272):
        Rig(Limits(pool={}))


def test_the_flow(rig: Rig) -> None:
    assert rig.offset() == 8 * MIB
    rig.ready()
    assert rig.driver.slots[0].vcpus == [1, 5]
    assert rig.start(flags=1) == 16
    assert rig.state is State.RUNNING
    assert rig.events() == 0


# In each, all that stands behind the first number is wrong, too.
@pytest.mark.parametrize(
    ("number", "act"),
    [
        (274, lambda rig: rig.memory_region(flags=1)),
        (270, lambda rig: rig.memory_region(size=1, address=1)),
        (274, lambda rig: rig.start(cid=1, flags=2)),
        (275, lambda rig: rig.start(cid=1)),
        (270, lambda rig: rig.start()),
        (270, lambda rig: rig.cpu(1000)),
        (270, lambda rig: rig.offset(0)),
    ],
)
def test_order_after_the_start(rig: Rig, number: int, act: Callable[[Rig], object]) -> None:
    rig.started()
    with refused(number):
        act(rig)


def test_order_of_the_checks_of_memory(rig: Rig) -> None:
    rig.memory_region()
    with refused(259):
        rig.memory_region(address=(1 << 64) - 1, size=1)
    with refused(261):
        rig.memory_region(address=(1 << 64) - 1, size=HUGE)
    with refused(260):
        rig.memory_region(address=BASE, size=(1 << 64) - HUGE)
    with refused(262):
        small_pages(rig)
    rig.memory.now = rig.memory.parent + 1
    with refused(errno.EIO):
        rig.memory_region(address=1, size=1)


def test_order_of_the_checks_at_the_start(rig: Rig) -> None:
    for number, repair in (
        (266, lambda: rig.memory_region(BASE, 62 * MIB)),
        (268, lambda: rig.memory_region(BASE + GIB, HUGE)),
        (267, rig.cpu),
        (269, rig.cpu),
    ):
        with refused(number):
            rig.start()
        repair()
    rig.start()


def test_another_process_adds_nothing_but_may_start(rig: Rig) -> None:
    rig.ready()
    rig.memory.now = rig.memory.parent + 1
    with refused(errno.EIO):
        rig.memory_region(BASE + GIB)
    assert rig.offset() == 8 * MIB
    assert rig.start() == 16


def test_a_child_that_adds_a_cpu_takes_the_core_all_the_same(rig: Rig) -> None:
    rig.memory_region()
    rig.memory.now = rig.memory.parent + 1
    with refused(errno.EIO):
        rig.cpu(1)
    assert rig.driver.pool == {2: (2, 6), 3: (3, 7)}


def test_no_memory_at_all_is_enomem(rig: Rig) -> None:
    with refused(errno.ENOMEM):
        rig.memory_region(size=0)


def test_unmapped_memory(rig: Rig) -> None:
    rig.memory.odd[BASE + 4 * MIB] = None
    with refused(errno.EFAULT):
        rig.memory_region()


def test_a_page_larger_than_what_was_said_is_donated_whole(rig: Rig) -> None:
    rig.memory.page_size = GIB
    rig.memory_region(BASE, HUGE)
    assert rig.driver.slots[0].memory_size == GIB
    rig.memory_region(BASE + GIB, HUGE)
    assert rig.driver.slots[0].regions == [(BASE, HUGE), (BASE + GIB, HUGE)]


def test_physical_ranges_are_merged_as_the_driver_does() -> None:
    ranges: list[tuple[int, int]] = []
    for address, size in ((0x1000, HUGE), (HUGE, 0x1000)):
        with pytest.raises(OSError, match="Invalid argument"):
            merge(ranges, address, size)
    steps = ((0x200000, HUGE, 1), (0, HUGE, 2), (0x600000, 2 * HUGE, 3), (0xA00000, 2 * HUGE, 3))
    for address, size, count in steps:
        merge(ranges, address, size)
        assert len(ranges) == count
    assert ranges[-1] == (0x600000, 4 * HUGE)


def test_regions_that_lie_together_are_one_of_the_devices() -> None:
    rig = Rig(Limits(regions=1))
    rig.memory_region(BASE, 64 * MIB)
    assert rig.driver.slots[0].ranges == [(BASE, 64 * MIB)]
    with refused(265):
        rig.memory_region(BASE + 64 * MIB, HUGE)
    rig.device.close()


def test_which_cpu_comes_next(rig: Rig) -> None:
    assert rig.cpu(6) == 6
    assert [rig.cpu() for _ in range(3)] == [2, 1, 5]
    assert rig.cpu(3) == 3
    assert rig.driver.pool == {}


def test_memory_refused_in_the_middle_stays_added(rig: Rig) -> None:
    rig.memory.odd[BASE + 4 * MIB] = Page(BASE + 4 * MIB, HUGE, True, 0)
    rig.driver.fail(Command.SLOT_ADD_MEM, errno.EINVAL)
    with refused(errno.EINVAL):
        rig.memory_region()
    with refused(262):
        rig.memory_region()


def test_a_cpu_refused_by_the_device_keeps_its_core(rig: Rig) -> None:
    rig.memory_region()
    rig.driver.fail(Command.SLOT_ADD_VCPU, errno.EIO)
    with refused(errno.EIO):
        rig.cpu(1)
    rig.cpu(2)
    rig.cpu(6)
    with refused(269):
        rig.start()


@pytest.mark.parametrize("command", [Command.SLOT_ALLOC, Command.ENCLAVE_START])
def test_a_command_that_fails_once(rig: Rig, command: Command) -> None:
    rig.ready()
    rig.driver.fail(command, errno.EPERM)
    act = rig.create if command is Command.SLOT_ALLOC else rig.start
    with refused(errno.EPERM):
        act()
    act()


def test_a_silent_device(rig: Rig) -> None:
    rig.driver.silent = True
    with refused(errno.ETIMEDOUT):
        rig.memory_region()


def test_slots_and_cids(rig: Rig) -> None:
    rig.started()
    rig.fd = rig.create()
    rig.memory_region(BASE + GIB)
    rig.cpu()
    rig.cpu()
    with refused(errno.EBUSY):
        rig.start(16)
    assert rig.start() == 17
    rig.create()
    rig.create()
    with refused(errno.ENOMEM):
        rig.create()


def test_the_end_is_seen_as_hang_up_and_stays(rig: Rig) -> None:
    rig.started()
    rig.driver.slots[0].end()
    assert rig.events() == select.POLLHUP
    assert rig.events() == select.POLLHUP
    with refused(270):
        rig.cpu()
    os.close(rig.fd)
    rig.device.reap()
    assert rig.driver.slots == []
    assert len(rig.driver.pool) == 3


def test_the_last_close_releases(rig: Rig) -> None:
    rig.started()
    copy = os.dup(rig.fd)
    os.close(rig.fd)
    rig.device.reap()
    assert rig.state is State.RUNNING
    os.close(copy)
    rig.device.reap()
    assert rig.driver.slots == []
    assert sorted(rig.driver.pool) == [1, 2, 3]


def test_a_close_that_the_device_refuses_leaks(rig: Rig) -> None:
    rig.started()
    rig.driver.fail(Command.ENCLAVE_STOP, errno.EIO)
    os.close(rig.fd)
    rig.device.reap()
    assert sorted(rig.driver.pool) == [2, 3]
    assert len(rig.driver.slots) == 1


def test_other_ioctls_are_none(rig: Rig) -> None:
    node = rig.device.open()
    for fd, request in ((node, ne.NE_ADD_VCPU), (rig.fd, ne.NE_CREATE_VM), (rig.fd, 0xAE25)):
        with pytest.raises(OSError, match="Inappropriate ioctl") as caught:
            rig.device.ioctl(fd, request, ne.ne_image_load_info())
        assert caught.value.errno == errno.ENOTTY
    os.close(node)


def test_arguments_that_are_not_there(rig: Rig) -> None:
    for request in (ne.NE_ADD_VCPU, ne.NE_GET_IMAGE_LOAD_INFO, ne.NE_SET_USER_MEMORY_REGION, ne.NE_START_ENCLAVE):
        for address in (0, 1 << 63):
            with pytest.raises(OSError, match="Bad address"):
                rig.device.ioctl_of(file_id(rig.fd), request, address, rig.memory)
    node = rig.device.open()
    with pytest.raises(OSError, match="Bad address"):
        rig.device.ioctl_of(file_id(node), ne.NE_CREATE_VM, 0, rig.memory)
    os.close(node)
    assert len(rig.driver.slots) == 1, "the slot is free again"
