# SPDX-License-Identifier: Apache-2.0
"""What carrier ``nitro`` needs of an EC2 instance: device, driver, permission, pool of CPUs, huge pages, vsock.

Sources: linux: Documentation/virt/ne_overview.rst; what users of nitro-cli run into.
"""

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Generator, Iterator
from pathlib import Path

from enclavekit.enclave.findings import Finding, State, missing, ok, warning
from enclavekit.errors import LaunchError, MissingError, NotEnoughMemoryError
from enclavekit.linux.cpu_topology import NODES, format_cpu_list, parse_cpu_list
from enclavekit.linux.hugepages import HugePages, free_blocks, read_hugepages
from enclavekit.linux.nitro_enclaves import NE_MIN_ENCLAVE_MEM_SIZE

AREA = "nitro"
MIB = 1 << 20
VENDOR, DEVICE = "0x1d0f", "0xe4c1"
MODULE = Path("sys/module/nitro_enclaves")
NODE = Path("dev/nitro_enclaves")
ALLOCATE = "enclave allocate, with memory_mib and cpu_count in /etc/nitro_enclaves/allocator.yaml"
HUGE_PAGE = 2 * MIB


def nitro_findings(root: Path, uid: int, groups: frozenset[int]) -> Iterator[Finding]:
    """In the order in which they have to be made good; what only makes sense after another is left out."""
    pci = _has_pci_device(root)
    module = (root / MODULE).is_dir()
    node = root / NODE
    if not pci and not module and not node.exists():
        yield missing(
            AREA,
            "device",
            "no Nitro Enclaves device: this is not an EC2 instance that was launched with enclaves enabled",
            "launch one with --enclave-options Enabled=true, or use another carrier",
        )
        return
    if pci:
        yield ok(AREA, "device", "PCI device 1d0f:e4c1")
    else:
        yield warning(
            AREA, "device", "no PCI device 1d0f:e4c1 is seen here", "expected in a container; else check lspci"
        )
    if not module:
        yield missing(AREA, "driver", "the module nitro_enclaves is not loaded", "modprobe nitro_enclaves")
    yield from _node(node, uid, groups)
    if module:
        pool_node = yield from _pool(root)
        yield from _pages(root, pool_node)
    yield from _hugetlb_limits(root)
    if (root / "dev/vsock").exists():
        yield ok(AREA, "vsock", "/dev/vsock")
    else:
        yield missing(AREA, "vsock", "no /dev/vsock: the parent cannot talk to enclaves", "modprobe vsock")


def check_capacity(root: Path, *, memory: int, cpus: int) -> str:
    """What an enclave of ``memory`` bytes and ``cpus`` CPUs would be given. MissingError, LaunchError where it is not.

    CPUs and pages that other enclaves hold are not counted.
    """
    for finding in nitro_findings(root, os.geteuid(), frozenset({os.getegid(), *os.getgroups()})):
        if finding.state is State.MISSING:
            raise MissingError(f"{finding.name}: {finding.message}", hint=finding.remedy)
    pool = parse_cpu_list((root / MODULE / "parameters/ne_cpus").read_text())
    if cpus > len(pool):
        raise LaunchError(f"CPUs: got {cpus}, the pool has {len(pool)}", hint="raise cpu_count in allocator.yaml")
    node = _node_of(root, pool)
    free = _free(read_hugepages(root, node))
    if memory > free:
        raise NotEnoughMemoryError(
            f"memory: the enclave is to have {memory // MIB} MiB, NUMA node {node} has {free // MIB} MiB of huge pages "
            "free",
            hint="raise memory_mib in allocator.yaml, or stop another enclave",
        )
    return f"{len(pool)} CPUs in the pool, {free // MIB} MiB of huge pages free on NUMA node {node}"


def _has_pci_device(root: Path) -> bool:
    for path in (root / "sys/bus/pci/devices").glob("*"):
        try:
            found = tuple((path / name).read_text().strip() for name in ("vendor", "device"))
        except OSError:
            continue
        if found == (VENDOR, DEVICE):
            return True
    return False


def _node(node: Path, uid: int, groups: frozenset[int]) -> Iterator[Finding]:
    try:
        found = node.stat()
    except OSError as error:
        yield missing(
            AREA, "node", f"/{NODE}: {(error.strerror or '').lower()}", "load the driver, or hand the device in"
        )
        return
    bits = found.st_mode >> (6 if found.st_uid == uid else 3 if found.st_gid in groups else 0) & 0o6
    group = _group(found.st_gid)
    what = f"/{NODE}: {stat.filemode(found.st_mode)[1:]}, group {group}"
    if uid == 0 or bits == 0o6:
        yield ok(AREA, "node", what)
    else:
        yield missing(AREA, "node", f"{what}: this user may not open it", f"usermod -aG {group} USER, and log in again")


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _pool(root: Path) -> Generator[Finding, None, int | None]:
    """Findings; returns the pool's NUMA node, None where there is none."""
    try:
        pool = parse_cpu_list((root / MODULE / "parameters/ne_cpus").read_text())
    except (OSError, ValueError) as error:
        yield missing(AREA, "cpus", f"the pool of CPUs cannot be read: {error}", ALLOCATE)
        return None
    if not pool:
        yield missing(AREA, "cpus", "the pool of CPUs is empty", ALLOCATE)
        return None
    yield ok(AREA, "cpus", f"{len(pool)} in the pool: {format_cpu_list(pool)}")
    return _node_of(root, pool)


def _nodes(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("node")) for path in (root / NODES).glob("node[0-9]*")) or [0]


def _node_of(root: Path, pool: frozenset[int]) -> int:
    """Also for CPUs that are offline, as those of the pool are: a node's directory has links to all that are its."""
    return next((node for node in _nodes(root) if (root / NODES / f"node{node}" / f"cpu{min(pool)}").exists()), 0)


def _pages(root: Path, pool_node: int | None) -> Iterator[Finding]:
    try:
        by_node = {node: read_hugepages(root, node) for node in _nodes(root)}
        blocks = free_blocks(root, HUGE_PAGE)
    except (OSError, ValueError) as error:
        yield missing(AREA, "huge pages", f"cannot be read: {error}", ALLOCATE)
        return
    node = pool_node if pool_node is not None else next(iter(by_node))
    free = _free(by_node[node])
    more = f"{blocks.get(node, 0) // MIB} MiB more could be made now"
    text = f"NUMA node {node}: {free // MIB} MiB free ({_words(by_node[node])}); {more}"
    if free < NE_MIN_ENCLAVE_MEM_SIZE:
        yield missing(AREA, "huge pages", text, ALLOCATE)
        if blocks.get(node, 0) < NE_MIN_ENCLAVE_MEM_SIZE:
            yield warning(
                AREA, "fragmentation", f"NUMA node {node}: its free memory is in pieces smaller than 2 MiB",
                "allocate soon after the machine has started, or: echo 1 > /proc/sys/vm/compact_memory",
            )  # fmt: skip
    else:
        yield ok(AREA, "huge pages", text)
    elsewhere = sum(_free(pages) for other, pages in by_node.items() if other != node)
    if elsewhere:
        yield warning(
            AREA, "numa", f"{elsewhere // MIB} MiB of huge pages are on other NUMA nodes than the CPUs: of no use",
            ALLOCATE,
        )  # fmt: skip
    large = [pages for pages in by_node[node] if pages.free and pages.size > HUGE_PAGE]
    if large and not any(pages.free for pages in by_node[node] if pages.size == HUGE_PAGE):
        yield warning(
            AREA, "page size", f"only pages of {large[-1].size // MIB} MiB are free: an enclave takes whole ones",
            "reserve pages of 2 MiB for small enclaves: hugepages-2048kB/nr_hugepages of that node",
        )  # fmt: skip


def _free(pages: list[HugePages]) -> int:
    return sum(one.size * one.free for one in pages)


def _words(pages: list[HugePages]) -> str:
    return ", ".join(f"{one.free} of {one.total} of {one.size // MIB} MiB" for one in pages) or "none"


def _hugetlb_limits(root: Path) -> Iterator[Finding]:
    """A container may be allowed less huge pages than there are."""
    try:
        own = next(
            line.removeprefix("0::/")
            for line in (root / "proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::/")
        )
    except (OSError, StopIteration):
        return
    directory = root / "sys/fs/cgroup" / own
    if ".." in own.split("/"):
        return
    for path in sorted(directory.glob("hugetlb.*.max")) if directory.is_dir() else ():
        try:
            limit = path.read_text().strip()
        except OSError:
            continue
        if limit == "0":
            size = path.name.split(".")[1]
            yield missing(
                AREA,
                "cgroup",
                f"this control group may use no huge pages of {size}",
                f"echo max > /{path.relative_to(root)}",
            )
