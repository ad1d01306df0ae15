# SPDX-License-Identifier: Apache-2.0
"""The files of a machine with enclaves: an instance of eight CPUs, two threads a core, on two NUMA nodes."""

from __future__ import annotations

import errno
from pathlib import Path

from enclavekit.enclave.allocator import Sysfs
from enclavekit.linux.cpu_topology import format_cpu_list, parse_cpu_list

MIB = 1 << 20
GIB_PAGES, SMALL_PAGES = "hugepages-1048576kB", "hugepages-2048kB"


def lay_out(root: Path, *, pool: str = "", pages: tuple[int, int] = (0, 0)) -> None:
    """Node 0 has CPUs 0,1,4,5 and node 1 has 2,3,6,7; CPU n's sibling is n+4. ``pages``: of 2 MiB, of each node."""
    files = {
        "sys/bus/pci/devices/0000:00:02.0/vendor": "0x1d0f",
        "sys/bus/pci/devices/0000:00:02.0/device": "0xe4c1",
        "sys/module/nitro_enclaves/parameters/ne_cpus": pool,
        "sys/devices/system/cpu/online": "0-7",
        "dev/nitro_enclaves": "",
        "dev/vsock": "",
        "proc/meminfo": "MemAvailable:    8388608 kB\n",
        "proc/self/cgroup": "0::/own\n",
        "proc/buddyinfo": "Node 0, zone   Normal  1 0 0 0 0 0 0 0 0 1 512\nNode 1, zone   Normal  1 0 0 0 0 0\n",
        "sys/fs/cgroup/cgroup.controllers": "cpu memory hugetlb",
        "sys/fs/cgroup/own/hugetlb.2MB.max": "max",
    }
    for cpu in range(8):
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu % 4},{cpu % 4 + 4}"
        files[f"sys/devices/system/node/node{cpu % 4 // 2}/cpu{cpu}"] = ""
    for node, cpus in ((0, "0-1,4-5"), (1, "2-3,6-7")):
        files[f"sys/devices/system/node/node{node}/cpulist"] = cpus
        for size, count in ((GIB_PAGES, 0), (SMALL_PAGES, pages[node])):
            for name in ("nr_hugepages", "free_hugepages"):
                files[f"sys/devices/system/node/node{node}/hugepages/{size}/{name}"] = str(count)
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")


class Kernel(Sysfs):
    """Answers as the kernel and the driver do: ``room`` is what each node can give, in MiB, by size of pages."""

    def __init__(self, root: Path, room: dict[tuple[int, str], int] | None = None, *, busy: bool = False) -> None:
        super().__init__(root)
        self.room = room or {}
        self.busy = busy
        self.refuse: str | None = None
        self.written: list[tuple[str, str]] = []

    def write(self, path: Path, text: str) -> None:
        where = str(path.relative_to(self.root))
        self.written.append((where, text.strip()))
        if path.name == "ne_cpus":
            self._pool(path, text.strip())
            return
        node = int(where.split("/node/node")[1].split("/")[0])
        size = path.parent.name
        most = self.room.get((node, size), 0)
        path.write_text(f"{min(int(text), most)}\n")

    def _pool(self, path: Path, text: str) -> None:
        if self.busy:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        before = parse_cpu_list(path.read_text())
        online = self.root / "sys/devices/system/cpu/online"
        everything = parse_cpu_list(online.read_text()) | before
        path.write_text("\n")
        online.write_text(format_cpu_list(everything))
        if not text or text == self.refuse:
            raise OSError(errno.EINVAL, "Invalid argument")
        path.write_text(text + "\n")
        online.write_text(format_cpu_list(everything - parse_cpu_list(text)))
