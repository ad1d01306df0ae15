# SPDX-License-Identifier: Apache-2.0
"""CPUs, nodes and huge pages, as sysfs has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from enclavekit.linux.cpu_topology import format_cpu_list, parse_cpu_list, read_topology
from enclavekit.linux.hugepages import HugePages, free_blocks, read_hugepages


@pytest.mark.parametrize(
    ("text", "cpus"), [("", []), ("\n", []), ("0", [0]), ("0,2-3\n", [0, 2, 3]), ("2-3, 6-9", [2, 3, 6, 7, 8, 9])]
)
def test_lists_of_cpus(text: str, cpus: list[int]) -> None:
    found = parse_cpu_list(text)
    assert sorted(found) == cpus
    assert parse_cpu_list(format_cpu_list(found)) == found


@pytest.mark.parametrize("text", ["x", "1,", ",", "1-", "-1", "3-1", "1-99999", "65536", "1;2", "٣", "1 2"])
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(ValueError, match="expected a list of CPUs like 0,2-3"):
        parse_cpu_list(text)


def test_this_machine() -> None:
    found = read_topology()
    assert os.sched_getaffinity(0) <= found.siblings.keys()
    assert all(cpu in siblings for cpu, siblings in found.siblings.items())
    assert frozenset().union(*found.nodes.values()) == found.siblings.keys()


def test_a_kernel_without_numa(tmp_path: Path) -> None:
    files = {
        "sys/devices/system/cpu/online": "0-1",
        "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "8",
        "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "3",
        "proc/buddyinfo": "Node 0, zone DMA 4 2 1\nnothing\nNode 0, zone   Normal  0 0 3\n",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = read_topology(tmp_path)
    assert (found.nodes, found.threads_per_core) == ({0: frozenset({0, 1})}, 1)
    assert found.node_of(1) == 0
    assert found.node_of(2) is None
    assert read_hugepages(tmp_path, 0) == [HugePages(2 << 20, 8, 3)]
    assert free_blocks(tmp_path, 4 * 4096) == {0: 4 * 4 * 4096}
    assert read_hugepages(tmp_path / "none", 0) == []
