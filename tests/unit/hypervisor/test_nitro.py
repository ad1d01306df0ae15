# SPDX-License-Identifier: Apache-2.0
"""Carrier ``nitro``: its pages, its heartbeat and who waits for it, its console, its errors."""

from __future__ import annotations

import io
import os
import select
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from enclavekit.eif import BytesContent, Discovery
from enclavekit.errors import (
    CarrierError,
    EnclaveRefusedError,
    FullCoresNotUsedError,
    MemMaxRegionsError,
    MissingError,
    NotEnoughMemoryError,
)
from enclavekit.hypervisor.carriers import CarrierName, CarrierOptions, select_carrier
from enclavekit.hypervisor.contract import LaunchSpec, Mode
from enclavekit.hypervisor.heartbeat import GIB, HEARTBEAT_PORT, HeartbeatPort, heartbeat_timeout_s
from enclavekit.hypervisor.launch import launch
from enclavekit.hypervisor.nitro import NitroCarrier, NitroEnclave
from enclavekit.hypervisor.nitro_memory import PageChoice, allocate
from enclavekit.hypervisor.parts import Parts
from enclavekit.linux.cpu_pool import pool_cpus, pool_node
from enclavekit.linux.hugetlb import map_page
from enclavekit.testing.nitro_driver import Command, Limits
from enclavekit.testing.simulated import SimulatedCarrier, UnixVsock

MIB = 1 << 20
PARTS = Parts(BytesContent(b"K" * 700), b"console=ttyS0", [BytesContent(b"1" * 99)])


class Pages:
    """A machine with so many pages of each size; those that were given back are counted again."""

    def __init__(self, **free: int) -> None:
        self.free = {int(name[1:]) * MIB: count for name, count in free.items()}

    def map(self, size: int) -> Page:
        if not self.free[size]:
            raise OSError(12, "Cannot allocate memory")
        self.free[size] -= 1
        return Page(self, size)


class Page:
    def __init__(self, machine: Pages, size: int) -> None:
        self.machine, self.size = machine, size

    def __len__(self) -> int:
        return self.size

    def close(self) -> None:
        self.machine.free[self.size] += 1


def chosen(machine: Pages, size: int, choice: PageChoice) -> list[int]:
    return [len(page) // MIB for page in allocate(size * MIB, list(machine.free), machine.map, choice)]


@pytest.mark.parametrize(
    ("free", "size", "nitro_cli", "tight"),
    [
        ({"m1024": 1, "m2": 512}, 256, [2] * 128, [2] * 128),
        ({"m1024": 1, "m2": 10}, 256, [1024], None),
        ({"m1024": 2, "m2": 512}, 1280, [1024, *[2] * 128], [1024, *[2] * 128]),
        ({"m32": 8, "m2": 16}, 65, [32, 32, 2], [32, 32, 2]),
        ({"m32": 2, "m2": 0}, 65, None, None),
        ({"m1024": 0, "m2": 1}, 1, [2], [2]),
    ],
)
def test_which_pages(
    free: dict[str, int], size: int, nitro_cli: Sequence[int] | None, tight: Sequence[int] | None
) -> None:
    for choice, expected in ((PageChoice.NITRO_CLI, nitro_cli), (PageChoice.TIGHT, tight)):
        machine = Pages(**free)
        if expected is None:
            with pytest.raises(NotEnoughMemoryError):
                chosen(machine, size, choice)
            assert machine.free == Pages(**free).free, "nothing is kept"
        else:
            assert chosen(machine, size, choice) == expected


def test_too_few_pages_are_told() -> None:
    with pytest.raises(NotEnoughMemoryError) as caught:
        chosen(Pages(m2=5), 64, PageChoice.TIGHT)
    assert str(caught.value) == "memory: 64 MiB of huge pages were asked for, 10 MiB could be had"


@pytest.mark.parametrize(
    ("image", "memory", "seconds"),
    [(1, 512 * MIB, 180), (6 * GIB, 100 * GIB, 180), (10 * GIB, 32 * GIB, 270), (10 * GIB, 128 * GIB, 360)],
)
def test_how_long_a_heartbeat_may_take(image: int, memory: int, seconds: float) -> None:
    assert heartbeat_timeout_s(image, memory) == seconds


def test_the_port_is_free_as_soon_as_one_was_answered(tmp_path: Path) -> None:
    vsock, lock = UnixVsock(tmp_path), tmp_path / "lock"
    first = HeartbeatPort(vsock, lock, 5.0)
    waiting: list[HeartbeatPort] = []
    second = threading.Thread(target=lambda: waiting.append(HeartbeatPort(vsock, lock, 30.0)))
    second.start()
    assert vsock.beat() == b"\xb7"
    assert select.select([first.fileno()], [], [], 5)[0]
    second.join(30)
    assert vsock.beat() == b"\xb7"
    assert select.select([waiting[0].fileno()], [], [], 5)[0]
    first.close()
    waiting[0].close()


def test_another_byte_is_no_heartbeat(tmp_path: Path) -> None:
    vsock = UnixVsock(tmp_path)
    port = HeartbeatPort(vsock, tmp_path / "lock", 5.0)
    with vsock.connect(3, HEARTBEAT_PORT, 5.0) as wrong:
        wrong.sendall(b"\x00")
        assert wrong.recv(1) == b""
    assert not select.select([port.fileno()], [], [], 0)[0]
    assert vsock.beat() == b"\xb7"
    port.close()


def test_a_port_that_is_never_free(tmp_path: Path) -> None:
    """nitro-cli has it, which knows nothing of our lock."""
    vsock = UnixVsock(tmp_path)
    with vsock.listen(HEARTBEAT_PORT), pytest.raises(CarrierError) as caught:
        HeartbeatPort(vsock, tmp_path / "lock", -1.0)
    assert str(caught.value) == "vsock port 9000: taken, and not given back"


@pytest.fixture
def carrier(tmp_path: Path) -> Iterator[SimulatedCarrier]:
    made = SimulatedCarrier(tmp_path)
    yield made
    made.close()


def started(carrier: SimulatedCarrier, directory: Path, *, cpus: int = 2, mode: Mode = Mode.PRODUCTION) -> NitroEnclave:
    spec = LaunchSpec("00000001", 64 * MIB, cpus, 0, Discovery.CMDLINE, directory)
    made = launch(carrier.create, spec, PARTS, mode=mode)
    assert isinstance(made, NitroEnclave)
    return made


def test_the_image_lies_at_8_mib_of_what_was_donated(carrier: SimulatedCarrier, tmp_path: Path) -> None:
    enclave = started(carrier, tmp_path)
    slot = carrier.driver.slots[0]
    expected = io.BytesIO()
    PARTS.write(expected)
    with open("/proc/self/mem", "rb", buffering=0) as memory:  # noqa: PTH123 - nothing else reads memory
        found = os.pread(memory.fileno(), PARTS.size, slot.regions[0][0] + 8 * MIB)
    assert found == expected.getvalue()
    enclave.close()


def test_a_console_in_debug_mode_only(carrier: SimulatedCarrier, tmp_path: Path) -> None:
    with carrier.vsock.console_of(16) as hypervisor:
        enclave = started(carrier, tmp_path, mode=Mode.DEBUG)
        serial, _ = hypervisor.accept()
        with serial:
            serial.sendall(b"Linux version")
            console = enclave.console()
            assert console is not None
            assert select.select([console], [], [], 5)[0]
            assert os.read(console, 100) == b"Linux version"
        enclave.close()
        carrier.device.reap()
        production = started(carrier, tmp_path)
        assert production.console() is None
        production.close()


def test_a_port_of_the_enclave(carrier: SimulatedCarrier, tmp_path: Path) -> None:
    enclave = started(carrier, tmp_path)
    with carrier.vsock.listen_at(16, 5000) as server, enclave.connect(5000) as client:
        inside, _ = server.accept()
        client.sendall(b"hello")
        assert inside.recv(10) == b"hello"
        inside.close()
    with pytest.raises(EnclaveRefusedError) as caught:
        enclave.connect(5001)
    assert str(caught.value) == "port 5001 of CID 16: connection refused"
    enclave.close()


def test_half_a_core(carrier: SimulatedCarrier, tmp_path: Path) -> None:
    with pytest.raises(FullCoresNotUsedError):
        started(carrier, tmp_path, cpus=1)
    carrier.device.reap()
    assert carrier.driver.slots == []
    assert len(carrier.driver.pool) == 3
    started(carrier, tmp_path).close()


def test_a_device_that_takes_few_regions(tmp_path: Path) -> None:
    carrier = SimulatedCarrier(tmp_path, limits=Limits(regions=3), sizes=[2 * MIB])
    with pytest.raises(MemMaxRegionsError) as caught:
        started(carrier, tmp_path)
    assert caught.value.hint == "reserve larger huge pages, early after boot, so that fewer are needed"
    carrier.close()


def test_a_device_that_falls_silent(carrier: SimulatedCarrier, tmp_path: Path) -> None:
    carrier.driver.fail(Command.ENCLAVE_START, 110)
    with pytest.raises(CarrierError) as caught:
        started(carrier, tmp_path)
    assert str(caught.value) == "NE_START_ENCLAVE: connection timed out (errno 110)"
    assert not carrier.vsock._answers(carrier.vsock.path(3, HEARTBEAT_PORT)), "nobody listens any more"


def test_the_pools_node(tmp_path: Path) -> None:
    """Whose CPUs are offline, so that the node does not list them."""
    assert (pool_cpus(tmp_path), pool_node(tmp_path)) == (frozenset(), None)
    (tmp_path / "sys/module/nitro_enclaves/parameters").mkdir(parents=True)
    (tmp_path / "sys/module/nitro_enclaves/parameters/ne_cpus").write_text("5,13\n\n")
    (tmp_path / "sys/devices/system/cpu/cpu5/node1").mkdir(parents=True)
    assert (pool_cpus(tmp_path), pool_node(tmp_path)) == (frozenset({5, 13}), 1)


def test_cpus_that_are_named(carrier: SimulatedCarrier, tmp_path: Path) -> None:
    cpus = frozenset({3, 7})
    spec = LaunchSpec("00000001", 64 * MIB, 2, 0, Discovery.CMDLINE, tmp_path, cpu_list=cpus)
    launch(carrier.create, spec, PARTS, mode=Mode.PRODUCTION).close()
    assert carrier.driver.slots[0].vcpus == [3, 7]


def test_no_huge_page_is_an_error_not_a_signal() -> None:
    with pytest.raises(OSError, match=r"Cannot allocate memory|Invalid argument"):
        map_page(16 << 30)


def test_a_machine_with_and_without_the_device(tmp_path: Path) -> None:
    device = tmp_path / "nitro_enclaves"
    with pytest.raises(MissingError) as caught:
        select_carrier(CarrierName.NITRO, CarrierOptions(tmp_path, nitro_device=device))
    assert str(caught.value) == f"carrier nitro: there is no {device}"
    device.touch()
    assert isinstance(select_carrier(None, CarrierOptions(tmp_path, nitro_device=device)).carrier, NitroCarrier)
