# SPDX-License-Identifier: Apache-2.0
"""CPUs, their cores and NUMA nodes (linux: Documentation/ABI/stable/sysfs-devices-system-cpu, -node).

All is read below a root directory, so that another machine's can be laid out and looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CPUS = Path("sys/devices/system/cpu")
NODES = Path("sys/devices/system/node")
MAX_CPU = 1 << 16
_PART = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Topology:
    """The CPUs that are online, by node, and the siblings of each, itself among them."""

    nodes: dict[int, frozenset[int]]
    siblings: dict[int, frozenset[int]]

    @property
    def threads_per_core(self) -> int:
        """Of the first core; machines have one kind."""
        return len(self.siblings[min(self.siblings)]) if self.siblings else 1

    def node_of(self, cpu: int) -> int | None:
        """None for a CPU that is not online."""
        return next((node for node, cpus in self.nodes.items() if cpu in cpus), None)


def read_topology(root: Path = Path("/")) -> Topology:
    """OSError and ValueError where the kernel does not say. A kernel without NUMA has one node, 0."""
    online = parse_cpu_list((root / CPUS / "online").read_text())
    nodes = {}
    for path in sorted((root / NODES).glob("node[0-9]*")):
        cpus = parse_cpu_list((path / "cpulist").read_text()) & online
        if cpus:
            nodes[int(path.name.removeprefix("node"))] = cpus
    siblings = {}
    for cpu in online:
        path = root / CPUS / f"cpu{cpu}" / "topology/thread_siblings_list"
        siblings[cpu] = parse_cpu_list(path.read_text()) if path.exists() else frozenset({cpu})
    return Topology(nodes or {0: online}, siblings)


def parse_cpu_list(text: str) -> frozenset[int]:
    """``0,2-3``, as the kernel writes lists of CPUs; nothing is none. ValueError."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if not part.strip() and not text.strip():
            continue
        match = _PART.fullmatch(part.strip())
        if match is None or not int(match[1]) <= int(match[2] or match[1]) < MAX_CPU:
            raise ValueError(f"{text.strip()[:64]!r}: expected a list of CPUs like 0,2-3")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)


def format_cpu_list(cpus: Iterable[int]) -> str:
    """One by one, with commas."""
    return ",".join(str(cpu) for cpu in sorted(cpus))
