# SPDX-License-Identifier: Apache-2.0
"""The kernel's own nitro_enclaves driver on our device: one parent, all that a program can do with it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from ne_machine import NeMachine, compiled
from ne_rows import LEAKS, MIB, PAGE, POLLHUP, ROWS, STARTED, Row

from enclavekit.lab.ne_device import Fault
from enclavekit.lab.ne_registers import Command

HERE = Path(__file__).parent
CPUS = dict(zip("abcdefzn", (2, 3, 4, 5, 6, 7, 1, 8), strict=True))
GIB = 1 << 30


@pytest.fixture(scope="module")
def _machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NeMachine]:
    directory = tmp_path_factory.mktemp("device")
    made = NeMachine(directory, compiled(HERE / "host/ne_steps.c", directory))
    yield made
    made.close()


@pytest.fixture
def machine(_machine: NeMachine) -> NeMachine:
    _machine.reset()
    return _machine


def answers(machine: NeMachine, row: Row) -> list[int]:
    machine.device.limits.regions, machine.device.limits.slots = row.regions, row.slots
    machine.hypervisor.end = row.end
    if row.fail:
        machine.device.faults.append((Command[row.fail[0]], Fault(row.fail[1])))
    if not row.pool:
        machine.do('pool ""; true')
    found = machine.steps(*row.words(CPUS))
    if not row.pool:
        machine.do("pool 2-7")
    return found


@pytest.mark.parametrize("name", ROWS)
def test_what_the_driver_answers(machine: NeMachine, name: str) -> None:
    assert answers(machine, ROWS[name]) == ROWS[name].expected(CPUS)


def test_pages_that_follow_one_another_are_one_range(machine: NeMachine) -> None:
    """As the driver's own KUnit vectors have them: a page, one before it, then two and two that follow each other."""
    assert machine.steps("order=103456") == [0, 0]
    sizes = [size for _, size in machine.hypervisor.memory]
    assert sizes == [PAGE, PAGE, 4 * PAGE]
    (second, _), (first, _), (last, _) = machine.hypervisor.memory
    assert (second - first, last - first) == (PAGE, 3 * PAGE)


def test_memory_of_another_node(machine: NeMachine) -> None:
    assert machine.steps("bind=1", f"mem=0:{PAGE}") == [0, 0, 264]


def test_a_larger_page_is_donated_whole_and_not_from_within(machine: NeMachine) -> None:
    found = machine.steps(f"giant={PAGE}:{PAGE}", f"giant=0:{PAGE}", "cpu=0", "cpu=0", "start=0:0")
    assert found == [0, 273, 0, 0, 0, 0]
    assert [size for _, size in machine.hypervisor.memory] == [GIB]


def test_what_the_hypervisor_is_asked_for(machine: NeMachine) -> None:
    assert machine.steps(*STARTED.format_map(CPUS).split()) == [0, 0, 0, 0, 0]
    assert machine.hypervisor.said == ["start", "stop", "free"]
    assert sum(size for _, size in machine.hypervisor.memory) == 64 * MIB
    machine.reset()
    machine.hypervisor.end = True
    assert machine.steps(*STARTED.format_map(CPUS).split(), "poll=20000") == [0, 0, 0, 0, 0, POLLHUP]
    assert machine.hypervisor.said == ["start", "free"], "what has ended is not stopped"


def test_a_slow_start(machine: NeMachine) -> None:
    machine.device.faults.append((Command.ENCLAVE_START, Fault(delay_s=1.5)))
    assert machine.steps(*STARTED.format_map(CPUS).split(), "poll=0") == [0] * 6


def test_a_start_that_the_hypervisor_refuses(machine: NeMachine) -> None:
    machine.hypervisor.rc = -errno.EBADMSG
    assert machine.steps(*STARTED.format_map(CPUS).split()) == [0, 0, 0, 0, errno.EBADMSG]
    assert machine.hypervisor.said == ["start", "free"]


def test_a_start_that_is_never_answered(machine: NeMachine) -> None:
    """The driver gives up after 120 s, which pass quickly here (tests/soak has them in full)."""
    machine.hypervisor.silent = True
    machine.ask(*STARTED.format_map(CPUS).split(), "poll=0", "any")
    assert machine.hypervisor.asked.wait(60)
    for _ in range(20):  # the driver may have been just about to wait
        machine.skip_time()
        with contextlib.suppress(TimeoutError):
            found = machine.answers(timeout_s=1)
            break
    assert found == [0, 0, 0, 0, errno.ETIMEDOUT, 0, errno.EBUSY], "for the device it is still starting"
    assert machine.hypervisor.said == ["start", "free"], "what the driver does not know to run is not stopped"


def test_the_driver_goes_and_comes(machine: NeMachine) -> None:
    for word in ("unbind", "bind"):
        machine.do(f"echo 0000:00:02.0 >/sys/bus/pci/drivers/nitro_enclaves/{word}")
    assert machine.steps(*STARTED.format_map(CPUS).split()) == [0, 0, 0, 0, 0]


def test_whatever_a_parent_writes_into_registers(machine: NeMachine) -> None:
    assert machine.steps("close", "poke=8000") == [0, 0, 0]
    assert machine.server.error is None
    assert machine.hypervisor.said.count("free") > 1, "slots that it has made by chance"
    assert machine.steps(*STARTED.format_map(CPUS).split()) == [0, 0, 0, 0, 0]


def test_one_after_another(machine: NeMachine) -> None:
    for _ in range(5):
        assert machine.steps(*STARTED.format_map(CPUS).split()) == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", LEAKS)
def test_what_the_driver_never_gets_back(machine: NeMachine, name: str) -> None:
    assert answers(machine, LEAKS[name]) == LEAKS[name].expected(CPUS)


def test_a_module_that_is_loaded_anew_has_all(machine: NeMachine) -> None:
    """Slots at once, lost CPUs after they were switched on by hand."""
    machine.do("busybox rmmod nitro_enclaves")
    assert machine.do("busybox cat /sys/devices/system/cpu/offline") == ["2-5"]
    machine.do("for cpu in 2 3 4 5; do echo 1 >/sys/devices/system/cpu/cpu$cpu/online; done")
    machine.do("busybox insmod /modules/*nitro_enclaves.ko && pool 2-7")
    assert machine.hypervisor.said == ["free", "free"], "the slots that the driver had lost"
    row = ROWS["the rest of a core first"]
    assert answers(machine, row) == row.expected(CPUS)


def test_the_machine_ends(machine: NeMachine) -> None:
    """The last test here: the parent is switched off, and nothing is left."""
    machine.close()
    assert machine.server.error is None
