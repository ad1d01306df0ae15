# SPDX-License-Identifier: Apache-2.0
"""One huge page of hugetlb in this process, of a NUMA node (mmap(2), mbind(2), madvise(2)).

Source: linux: Documentation/admin-guide/mm/hugetlbpage.rst, include/uapi/linux/mempolicy.h.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

MAP_HUGETLB = 0x40000
MAP_HUGE_SHIFT = 26
MADV_POPULATE_WRITE = 23
_MPOL_BIND = 2
_MAX_NODES = 1024
_SYS_MBIND = {"x86_64": 237, "aarch64": 235}


def map_page(size: int, node: int | None = None) -> mmap.mmap:
    """A page of ``size`` bytes that is really there, from ``node`` if that is given. ``OSError`` when none is free.

    A page that was only reserved may be on another node, and its first use then ends the process; so it is touched
    here, where that is an error.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB | (size.bit_length() - 1) << MAP_HUGE_SHIFT
    page = mmap.mmap(-1, size, ctypes.c_int(flags).value)
    try:
        if node is not None:
            _bind(page, node)
        try:
            page.madvise(MADV_POPULATE_WRITE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # Linux before 5.14 has none: the reservation must do
                raise
    except BaseException:
        page.close()
        raise
    return page


def _bind(page: mmap.mmap, node: int) -> None:
    number = _SYS_MBIND.get(os.uname().machine)
    if number is None or not 0 <= node < _MAX_NODES:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    anchor = ctypes.c_char.from_buffer(page)
    address = ctypes.addressof(anchor)
    del anchor
    mask = (1 << node).to_bytes(_MAX_NODES // 8, "little")
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_ulong(address), ctypes.c_ulong(len(page)), _MPOL_BIND, mask, ctypes.c_ulong(_MAX_NODES), 0)
    if libc.syscall(number, *arguments) and ctypes.get_errno() != errno.ENOSYS:  # a kernel without NUMA has one node
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
