# SPDX-License-Identifier: Apache-2.0
"""allocator.yaml: read, checked, and applied to a machine laid out in files; rolled back when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from ec2_machine import GIB_PAGES, MIB, SMALL_PAGES, Kernel, lay_out

from enclavekit.enclave.allocator import Allocation, AllocatorConfig, allocate, parse_config
from enclavekit.errors import AllocationError, AllocatorConfigError, MissingError

POOL = "sys/module/nitro_enclaves/parameters/ne_cpus"


def count(root: Path, node: int, size: str) -> int:
    return int((root / f"sys/devices/system/node/node{node}/hugepages/{size}/nr_hugepages").read_text())


def pool(root: Path) -> str:
    return (root / POOL).read_text().strip()


def test_the_file_that_nitro_clis_package_has() -> None:
    text = b"---\n# Enclave configuration file.\n#\nmemory_mib: 512\n#\ncpu_count: 2\n#\n# cpu_pool: 2,3,6-9\n"
    assert parse_config(text, "a") == AllocatorConfig(512, cpu_count=2)
    assert parse_config(b"---\nmemory_mib: 1\ncpu_pool: 2,3,6-9\n", "a") == AllocatorConfig(
        1, cpu_pool=frozenset({2, 3, 6, 7, 8, 9})
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "a: nothing in it, expected --- and memory_mib:"),
        (b"memory_mib: 512\n", "a:1: got 'memory_mib: 512', expected --- before anything else"),
        (b"---\nmemory: 512\n", "a:2: got 'memory: 512', expected memory_mib:, cpu_count: or cpu_pool:"),
        (b"---\ncpu_count: 2\n", "a: memory_mib is missing"),
        (b"---\nmemory_mib: 512\n", "a: expected either cpu_count or cpu_pool"),
        (b"---\nmemory_mib: 512\ncpu_count: 2\ncpu_pool: 1\n", "a: expected either cpu_count or cpu_pool"),
        (b"---\nmemory_mib: 512\nmemory_mib: 512\n", "a:3: memory_mib stands there twice"),
        (b"---\nmemory_mib: 1G\ncpu_count: 2\n", f"a: memory_mib: got '1G', expected a number from 1 to {1 << 30}"),
        (b"---\nmemory_mib: 1\ncpu_count: 0\n", "a: cpu_count: got '0', expected a number from 1 to 4096"),
        (b"---\nmemory_mib: 1\ncpu_pool: 3-1\n", "a: cpu_pool: '3-1': expected a list of CPUs like 0,2-3"),
        (b"---\nmemory_mib: 1\ncpu_pool:\n", "a: cpu_pool: no CPU"),
        (b"---\n\xff\n", "a: not text at offset 0x4"),
        (b"#" * 70_000, "a: more than 65536 bytes"),
    ],
)
def test_files_that_are_none(text: bytes, message: str) -> None:
    with pytest.raises(AllocatorConfigError) as caught:
        parse_config(text, "a")
    assert caught.value.message == message


def test_a_count_takes_whole_cores_but_the_first_and_large_pages_first(tmp_path: Path) -> None:
    lay_out(tmp_path)
    kernel = Kernel(tmp_path, {(0, GIB_PAGES): 1, (0, SMALL_PAGES): 500})
    made = allocate(AllocatorConfig(1025, cpu_count=2), kernel)
    assert made == Allocation(0, frozenset({1, 5}), {1 << 30: 1, 2 * MIB: 1})
    assert made.memory == 1026 * MIB
    assert pool(tmp_path) == "1,5"
    assert (count(tmp_path, 0, GIB_PAGES), count(tmp_path, 0, SMALL_PAGES)) == (1, 1)


def test_the_node_that_has_enough(tmp_path: Path) -> None:
    lay_out(tmp_path, pages=(7, 0))
    made = allocate(AllocatorConfig(64, cpu_count=2), Kernel(tmp_path, {(0, SMALL_PAGES): 7, (1, SMALL_PAGES): 32}))
    assert made == Allocation(1, frozenset({2, 6}), {2 * MIB: 32})
    assert count(tmp_path, 0, SMALL_PAGES) == 7  # what node 0 had, it has again
    made = allocate(AllocatorConfig(64, cpu_count=4), Kernel(tmp_path, {(1, SMALL_PAGES): 32}))
    assert made.cpus == frozenset({2, 3, 6, 7})


def test_a_pool_in_place_of_another(tmp_path: Path) -> None:
    lay_out(tmp_path, pool="3,7")
    (tmp_path / "sys/devices/system/cpu/online").write_text("0-2,4-6\n")
    kernel = Kernel(tmp_path, {(1, SMALL_PAGES): 100})
    assert allocate(AllocatorConfig(64, cpu_pool=frozenset({2, 6, 3, 7})), kernel).node == 1
    assert pool(tmp_path) == "2,3,6,7"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AllocatorConfig(64, cpu_count=3), "cpu_count: got 3, expected a multiple of 2: whole cores of 2 threads"),
        (
            AllocatorConfig(64, cpu_count=6),
            "cpu_count: got 6, a NUMA node of this machine has 4 at most, without the core of CPU 0",
        ),
        (AllocatorConfig(64, cpu_pool=frozenset({9})), "cpu_pool: CPUs 9 are not online"),
        (
            AllocatorConfig(64, cpu_pool=frozenset({4})),
            "cpu_pool: CPUs 4 are of CPU 0's core, which stays with the parent",
        ),
        (AllocatorConfig(64, cpu_pool=frozenset({1})), "cpu_pool: CPUs 5 are missing: whole cores are given away"),
        (AllocatorConfig(64, cpu_pool=frozenset({1, 5, 2, 6})), "cpu_pool: of NUMA nodes ['0', '1'], expected one"),
        (AllocatorConfig(900, cpu_count=4), "memory_mib: got 900 MiB, NUMA node 1 has 200 MiB that lie together"),
    ],
)
def test_what_fails_changes_nothing(tmp_path: Path, config: AllocatorConfig, message: str) -> None:
    lay_out(tmp_path, pool="1,5", pages=(20, 10))
    (tmp_path / "sys/devices/system/cpu/online").write_text("0,2-4,6-7\n")
    kernel = Kernel(tmp_path, {(0, SMALL_PAGES): 100, (1, SMALL_PAGES): 100})
    with pytest.raises(AllocationError) as caught:
        allocate(config, kernel)
    assert caught.value.message == message
    assert (pool(tmp_path), count(tmp_path, 0, SMALL_PAGES), count(tmp_path, 1, SMALL_PAGES)) == ("1,5", 20, 10)


def test_a_driver_that_refuses_the_cpus(tmp_path: Path) -> None:
    lay_out(tmp_path, pool="1,5", pages=(20, 0))
    (tmp_path / "sys/devices/system/cpu/online").write_text("0,2-4,6-7\n")
    kernel = Kernel(tmp_path, {(0, SMALL_PAGES): 100, (1, SMALL_PAGES): 100})
    kernel.refuse = "2,3,6,7"
    with pytest.raises(AllocationError, match=r"^the driver refuses CPUs 2,3,6,7: invalid argument$"):
        allocate(AllocatorConfig(64, cpu_count=4), kernel)
    assert (pool(tmp_path), count(tmp_path, 0, SMALL_PAGES), count(tmp_path, 1, SMALL_PAGES)) == ("1,5", 20, 0)


def test_an_enclave_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, pool="1,5", pages=(20, 0))
    kernel = Kernel(tmp_path, busy=True)
    for user, message in ((0, "the pool of CPUs cannot be changed while an enclave runs"), (7, "only root can set")):
        monkeypatch.setattr("os.geteuid", lambda user=user: user)
        with pytest.raises(AllocationError, match=message):
            allocate(AllocatorConfig(64, cpu_count=2), kernel)
    assert {where for where, _ in kernel.written} == {POOL}
    assert pool(tmp_path) == "1,5"


def test_no_driver(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"^the driver nitro_enclaves is not loaded$"):
        allocate(AllocatorConfig(64, cpu_count=2), Kernel(tmp_path))
