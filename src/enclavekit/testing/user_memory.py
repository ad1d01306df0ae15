# SPDX-License-Identifier: Apache-2.0
"""A program's memory as the driver sees it: read, written, and page by page what backs it (proc(5): mem, smaps).

Physical addresses are told to no ordinary user, so pages that follow one another in a program count as contiguous; and
so is a page's NUMA node the one that it is given here.
"""

from __future__ import annotations

import errno
import os
import re
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

HUGE = 2 << 20
_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)
_PAGE_SIZE = re.compile(r"^KernelPageSize:\s+([0-9]+) kB$", re.MULTILINE)
_FLAGS = re.compile(r"^VmFlags:.* ht(?: |$)", re.MULTILINE)

_Area = tuple[int, int, int, bool]
"""Start, end, page size, whether hugetlb."""


@dataclass(frozen=True, slots=True)
class Page:
    """What backs an address. ``start`` is its own address in the program; sizes in bytes."""

    start: int
    size: int
    hugetlb: bool
    physical: int
    node: int = 0


def _fault() -> OSError:
    return OSError(errno.EFAULT, os.strerror(errno.EFAULT))


class UserMemory(Protocol):
    """The memory of whoever issues an ioctl."""

    @property
    def mm(self) -> int:
        """Which address space this is; a child of fork has another."""

    def read(self, address: int, size: int) -> bytes:
        """``OSError`` EFAULT where nothing is mapped."""

    def write(self, address: int, data: bytes) -> None:
        """``OSError`` EFAULT where nothing can be written."""

    def pages(self) -> Callable[[int], Page | None]:
        """As it is now: the page of an address, None where nothing is mapped."""


class ProcessMemory:
    """Of a process, ourselves too. ``ordinary``: memory without huge pages counts as if it had some of 2 MiB."""

    def __init__(
        self, pid: int, *, ordinary: bool = False, node: int = 0, on_ordinary: Callable[[], None] | None = None
    ) -> None:
        self._pid = pid
        self._proc = Path(f"/proc/{pid}")
        self._ordinary = ordinary
        self._on_ordinary = on_ordinary
        self._node = node

    @property
    def mm(self) -> int:
        """The process's number."""
        return self._pid

    def read(self, address: int, size: int) -> bytes:
        """Through /proc/PID/mem."""
        data = b""
        with suppress(OSError, OverflowError), (self._proc / "mem").open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, address)
        if len(data) != size:
            raise _fault()
        return data

    def write(self, address: int, data: bytes) -> None:
        """Through /proc/PID/mem, which looks at no protection; so that is looked at before."""
        if not self._writable(address, len(data)):
            raise _fault()
        try:
            with (self._proc / "mem").open("r+b", buffering=0) as file:
                os.pwrite(file.fileno(), data, address)
        except OSError as error:
            raise _fault() from error

    def _writable(self, address: int, size: int) -> bool:
        for line in (self._proc / "maps").read_text().splitlines():
            bounds, rights = line.split()[:2]
            start, end = (int(word, 16) for word in bounds.split("-"))
            if start <= address < end:
                return "w" in rights and address + size <= end
        return False

    def pages(self) -> Callable[[int], Page | None]:
        """From smaps, once."""
        text = (self._proc / "smaps").read_text()
        heads = list(_HEAD.finditer(text))
        areas: list[_Area] = []
        for head, following in zip(heads, [*heads[1:], None], strict=True):
            entry = text[head.start() : following.start() if following else len(text)]
            size = _PAGE_SIZE.search(entry)
            page_size = int(size[1]) << 10 if size else 4096
            areas.append((int(head[1], 16), int(head[2], 16), page_size, bool(_FLAGS.search(entry))))
        starts = [area[0] for area in areas]

        def area_of(address: int) -> _Area | None:
            index = bisect_right(starts, address) - 1
            return areas[index] if index >= 0 and address < areas[index][1] else None

        def page(address: int) -> Page | None:
            area = area_of(address)
            if area is None:
                return None
            _, _, size, hugetlb = area
            if not hugetlb and self._ordinary and area_of((address & -HUGE) + HUGE - 1):
                if self._on_ordinary:
                    self._on_ordinary()
                size, hugetlb = HUGE, True
            first = address & -size
            return Page(first, size, hugetlb, first, self._node)

        return page
