# SPDX-License-Identifier: Apache-2.0
"""``allocator.yaml``: memory and CPUs set aside for enclaves, as nitro-enclaves-allocator does, or nothing changed.

    ---
    memory_mib: 512
    cpu_count: 2        # or cpu_pool: 2,3,6-9

The pages and the CPUs are of one NUMA node. Every size of huge pages there is given back first, then the largest are
taken first. What fails is rolled back.

Source: aws-nitro-enclaves-cli bootstrap/nitro-enclaves-allocator, and its allocator.yaml.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from enclavekit.errors import AllocationError, AllocatorConfigError, MissingError
from enclavekit.linux.cpu_topology import Topology, format_cpu_list, parse_cpu_list, read_topology
from enclavekit.linux.hugepages import count_file, read_hugepages

MIB = 1 << 20
MAX_CONFIG = 1 << 16
MAX_MEMORY_MIB = 1 << 30
POOL = Path("sys/module/nitro_enclaves/parameters/ne_cpus")
MAX_POOL_TEXT = 512
"""Bytes that the driver takes."""


@dataclass(frozen=True, slots=True)
class AllocatorConfig:
    """``cpu_count`` or ``cpu_pool``; the other is None."""

    memory_mib: int
    cpu_count: int | None = None
    cpu_pool: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class Allocation:
    """What is set aside: ``pages`` is a number of pages by size in bytes."""

    node: int
    cpus: frozenset[int]
    pages: Mapping[int, int]

    @property
    def memory(self) -> int:
        """Bytes."""
        return sum(size * count for size, count in self.pages.items())


class Sysfs:
    """The kernel's files below a root directory. OSError as files do."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def read(self, path: Path) -> str:
        """All of a small file."""
        return path.read_text()

    def write(self, path: Path, text: str) -> None:
        """In one write, as the kernel wants it; it makes no files."""
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def parse_config(data: bytes, where: str) -> AllocatorConfig:
    """AllocatorConfigError, with the number of the line."""
    found = _read_lines(data, where)
    if "memory_mib" not in found:
        raise AllocatorConfigError(f"{where}: memory_mib is missing")
    if ("cpu_count" in found) == ("cpu_pool" in found):
        raise AllocatorConfigError(f"{where}: expected either cpu_count or cpu_pool")
    memory = _number(found["memory_mib"], "memory_mib", MAX_MEMORY_MIB, where)
    if "cpu_count" in found:
        return AllocatorConfig(memory, cpu_count=_number(found["cpu_count"], "cpu_count", 4096, where))
    try:
        pool = parse_cpu_list(found["cpu_pool"].strip("\"'"))
    except ValueError as error:
        raise AllocatorConfigError(f"{where}: cpu_pool: {error}") from error
    if not pool:
        raise AllocatorConfigError(f"{where}: cpu_pool: no CPU")
    return AllocatorConfig(memory, cpu_pool=pool)


def _read_lines(data: bytes, where: str) -> dict[str, str]:
    """Keys and values, after ``---``."""
    if len(data) > MAX_CONFIG:
        raise AllocatorConfigError(f"{where}: more than {MAX_CONFIG} bytes")
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError as error:
        raise AllocatorConfigError(f"{where}: not text at offset 0x{error.start:x}") from error
    found: dict[str, str] = {}
    begun = False
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        if not begun:
            if words != "---":
                raise AllocatorConfigError(f"{where}:{number}: got {words[:64]!r}, expected --- before anything else")
            begun = True
            continue
        key, colon, value = (word.strip() for word in words.partition(":"))
        if not colon or key not in ("memory_mib", "cpu_count", "cpu_pool"):
            raise AllocatorConfigError(
                f"{where}:{number}: got {words[:64]!r}, expected memory_mib:, cpu_count: or cpu_pool:"
            )
        if key in found:
            raise AllocatorConfigError(f"{where}:{number}: {key} stands there twice")
        found[key] = value
    if not begun:
        raise AllocatorConfigError(f"{where}: nothing in it, expected --- and memory_mib:")
    return found


def _number(text: str, key: str, most: int, where: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:20]) <= most:
        raise AllocatorConfigError(f"{where}: {key}: got {text[:32]!r}, expected a number from 1 to {most}")
    return int(text)


def choose_cpus(config: AllocatorConfig, topology: Topology) -> Iterator[tuple[int, frozenset[int]]]:
    """Nodes, and which CPUs of each: one at least. AllocationError where the driver would refuse, or has too few."""
    first = topology.siblings.get(0, frozenset({0}))
    if config.cpu_pool is not None:
        yield _check_pool(config.cpu_pool, topology, first), config.cpu_pool
        return
    count = config.cpu_count or 0
    threads = topology.threads_per_core
    if count % threads:
        raise AllocationError(
            f"cpu_count: got {count}, expected a multiple of {threads}: whole cores of {threads} threads"
        )
    most = 0
    found = False
    for node, cpus in sorted(topology.nodes.items()):
        chosen: set[int] = set()
        for cpu in sorted(cpus - first):
            core = topology.siblings[cpu]
            if len(chosen) < count and cpu not in chosen and core <= cpus:
                chosen |= core
        most = max(most, len(chosen))
        if len(chosen) == count:
            found = True
            yield node, frozenset(chosen)
    if not found:
        raise AllocationError(
            f"cpu_count: got {count}, a NUMA node of this machine has {most} at most, without the core of CPU 0"
        )


def _check_pool(pool: frozenset[int], topology: Topology, first: frozenset[int]) -> int:
    def words(cpus: frozenset[int]) -> str:
        return format_cpu_list(sorted(cpus)[:32])

    if absent := pool - topology.siblings.keys():
        raise AllocationError(f"cpu_pool: CPUs {words(frozenset(absent))} are not online")
    if pool & first:
        raise AllocationError(f"cpu_pool: CPUs {words(pool & first)} are of CPU 0's core, which stays with the parent")
    missing = frozenset().union(*(topology.siblings[cpu] for cpu in pool)) - pool
    if missing:
        raise AllocationError(f"cpu_pool: CPUs {words(missing)} are missing: whole cores are given away")
    nodes = {topology.node_of(cpu) for cpu in pool}
    if len(nodes) != 1:
        raise AllocationError(f"cpu_pool: of NUMA nodes {sorted(map(str, nodes))}, expected one")
    return nodes.pop() or 0


def allocate(config: AllocatorConfig, sysfs: Sysfs | None = None) -> Allocation:
    """Set it aside, in place of what was. MissingError without the driver; AllocationError, and nothing has changed."""
    sysfs = sysfs or Sysfs()
    pool = sysfs.root / POOL
    try:
        before = sysfs.read(pool).strip()
    except FileNotFoundError as error:
        raise MissingError("the driver nitro_enclaves is not loaded", hint="modprobe nitro_enclaves") from error
    except OSError as error:
        raise AllocationError(f"cannot read the pool of CPUs: {(error.strerror or str(error)).lower()}") from error
    with ExitStack() as undo:
        # CPUs of the pool are offline, so nothing is known of them as long as they are in it.
        _clear_pool(sysfs, pool)
        if before:
            undo.callback(_restore, sysfs, pool, before)
        try:
            topology = read_topology(sysfs.root)
        except (OSError, ValueError) as error:
            raise AllocationError(f"cannot read the machine's CPUs: {error}") from error
        failure: AllocationError | None = None
        for node, cpus in choose_cpus(config, topology):
            attempt = undo.enter_context(ExitStack())
            try:
                pages = _take_pages(sysfs, node, config.memory_mib, attempt)
                _set_pool(sysfs, pool, cpus, attempt)
            except AllocationError as error:
                attempt.close()
                failure = failure or error
                continue
            undo.pop_all()
            return Allocation(node, cpus, pages)
        raise failure or AllocationError("no NUMA node")


def _clear_pool(sysfs: Sysfs, pool: Path) -> None:
    """The driver answers an empty list with EINVAL, and gives the CPUs back all the same."""
    try:
        sysfs.write(pool, "\n")
    except PermissionError as error:
        if os.geteuid() != 0:
            raise AllocationError("only root can set CPUs and memory aside", hint="sudo enclave allocate") from error
        raise AllocationError(
            "the pool of CPUs cannot be changed while an enclave runs", hint="nitro-cli terminate-enclave --all"
        ) from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise AllocationError(f"cannot clear the pool of CPUs: {error.strerror}") from error


def _set_pool(sysfs: Sysfs, pool: Path, cpus: frozenset[int], undo: ExitStack) -> None:
    text = format_cpu_list(cpus)
    if len(text) > MAX_POOL_TEXT:
        raise AllocationError(f"a list of {len(cpus)} CPUs takes {len(text)} bytes, the driver takes {MAX_POOL_TEXT}")
    undo.callback(_restore, sysfs, pool, "")
    try:
        sysfs.write(pool, f"{text}\n")
    except OSError as error:
        raise AllocationError(
            f"the driver refuses CPUs {text[:64]}: {(error.strerror or str(error)).lower()}",
            hint="the kernel's log (dmesg) says which it does not take",
        ) from error


def _take_pages(sysfs: Sysfs, node: int, memory_mib: int, undo: ExitStack) -> dict[int, int]:
    try:
        there = read_hugepages(sysfs.root, node)
    except (OSError, ValueError) as error:
        raise AllocationError(f"cannot read the huge pages of NUMA node {node}: {error}") from error
    if not there:
        raise AllocationError(f"NUMA node {node} has no huge pages: the kernel was built without them")
    smallest = there[-1].size
    wanted = -(-memory_mib * MIB // smallest) * smallest
    for pages in there:
        path = count_file(sysfs.root, node, pages.size)
        undo.callback(_restore, sysfs, path, str(pages.total))
        _write_count(sysfs, path, 0)
    taken: dict[int, int] = {}
    left = wanted
    for pages in there:
        if count := left // pages.size:
            path = count_file(sysfs.root, node, pages.size)
            _write_count(sysfs, path, count)
            had = min(_read_count(sysfs, path), count)
            if had:
                taken[pages.size] = had
            left -= had * pages.size
    if left:
        raise AllocationError(
            f"memory_mib: got {wanted // MIB} MiB, NUMA node {node} has {(wanted - left) // MIB} MiB that lie together",
            hint="ask for less, or allocate soon after the machine has started: its memory is in pieces later",
        )
    return taken


def _write_count(sysfs: Sysfs, path: Path, count: int) -> None:
    try:
        sysfs.write(path, f"{count}\n")
    except PermissionError as error:
        raise AllocationError("only root can set CPUs and memory aside", hint="sudo enclave allocate") from error
    except OSError as error:
        raise AllocationError(f"{path}: cannot write {count}: {(error.strerror or str(error)).lower()}") from error


def _read_count(sysfs: Sysfs, path: Path) -> int:
    try:
        return int(sysfs.read(path))
    except (OSError, ValueError) as error:
        raise AllocationError(f"{path}: not a number of pages: {error}") from error


def _restore(sysfs: Sysfs, path: Path, text: str) -> None:
    """Of all that is to be rolled back, one thing: the rest must be tried whatever becomes of it."""
    try:
        sysfs.write(path, f"{text}\n")
    except OSError as error:
        if not (text == "" and error.errno == errno.EINVAL):
            raise AllocationError(
                f"{path}: cannot be set back to {text or 'nothing'!r}: {(error.strerror or str(error)).lower()}",
                hint="what was set aside before is lost: allocate it again",
            ) from error
