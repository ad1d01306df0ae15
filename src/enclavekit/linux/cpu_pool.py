# SPDX-License-Identifier: Apache-2.0
"""The pool of CPUs that the driver gives to enclaves: its parameter ``ne_cpus``, and the pool's NUMA node.

Source: linux: drivers/virt/nitro_enclaves/ne_misc_dev.c (ne_cpus), Documentation/ABI/stable/sysfs-devices-node. The
driver checks that all are of one node. They are offline, so the node's own list no longer names them.
"""

from __future__ import annotations

from pathlib import Path

from enclavekit.linux.cpu_topology import parse_cpu_list

NE_CPUS = Path("sys/module/nitro_enclaves/parameters/ne_cpus")
CPUS = Path("sys/devices/system/cpu")


def pool_cpus(root: Path = Path("/")) -> frozenset[int]:
    """Nothing where there is no driver, or no pool."""
    try:
        return parse_cpu_list((root / NE_CPUS).read_text())
    except (OSError, ValueError):
        return frozenset()


def pool_node(root: Path = Path("/")) -> int | None:
    """The node that an enclave's memory has to be of; None where that is not known."""
    for cpu in sorted(pool_cpus(root)):
        for path in (root / CPUS / f"cpu{cpu}").glob("node[0-9]*"):
            return int(path.name.removeprefix("node"))
    return None
