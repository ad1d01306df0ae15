# SPDX-License-Identifier: Apache-2.0
"""Huge pages of a NUMA node (linux: Documentation/admin-guide/mm/hugetlbpage.rst, mm/page_alloc.c's buddyinfo).

All is read below a root directory, so that another machine's can be laid out and looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

KIB = 1 << 10
PAGE_SIZE = 4096
NODES = Path("sys/devices/system/node")
EVERYWHERE = Path("sys/kernel/mm/hugepages")
_SIZE = re.compile(r"hugepages-([0-9]{1,9})kB", re.ASCII)
_ZONE = re.compile(r"Node ([0-9]{1,5}), zone +\S+ +([0-9 ]+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class HugePages:
    """``total`` and ``free`` pages of ``size`` bytes."""

    size: int
    total: int
    free: int


def hugepages_directory(root: Path, node: int) -> Path:
    """Of a node; a kernel without NUMA has one for all."""
    path = root / NODES / f"node{node}" / "hugepages"
    return path if path.is_dir() else root / EVERYWHERE


def read_hugepages(root: Path, node: int) -> list[HugePages]:
    """The largest first. OSError and ValueError where the kernel does not say."""
    found = []
    directory = hugepages_directory(root, node)
    if not directory.is_dir():
        return []
    for path in directory.iterdir():
        match = _SIZE.fullmatch(path.name)
        if match:
            total, free = (int((path / name).read_text()) for name in ("nr_hugepages", "free_hugepages"))
            found.append(HugePages(int(match[1]) * KIB, total, free))
    return sorted(found, key=lambda pages: -pages.size)


def count_file(root: Path, node: int, size: int) -> Path:
    """Where the number of pages is read and written."""
    return hugepages_directory(root, node) / f"hugepages-{size // KIB}kB" / "nr_hugepages"


def free_blocks(root: Path, size: int) -> Mapping[int, int]:
    """By node, the bytes of free memory that lie together in blocks of ``size`` at least: what pages could be made of.

    The kernel can move other memory out of the way and make more.
    """
    found: dict[int, int] = {}
    for line in (root / "proc/buddyinfo").read_text().splitlines():
        match = _ZONE.match(line)
        if match is None:
            continue
        free = sum(
            int(count) * (PAGE_SIZE << order)
            for order, count in enumerate(match[2].split())
            if PAGE_SIZE << order >= size
        )
        found[int(match[1])] = found.get(int(match[1]), 0) + free
    return found
