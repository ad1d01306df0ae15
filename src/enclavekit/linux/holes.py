# SPDX-License-Identifier: Apache-2.0
"""Holes in files: where the data are (lseek(2), SEEK_DATA), and data made a hole (fallocate(2), linux/falloc.h)."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02


def data_ranges(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where a file has data between these offsets, as starts and ends. ``OSError`` for a file that cannot tell.

    The file's position is not used, but it moves.
    """
    while start < end:
        try:
            found = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing from here on
                return
            raise
        if found >= end:
            return
        start = min(os.lseek(fd, found, os.SEEK_HOLE), end)
        yield found, start


def punch(fd: int, offset: int, size: int) -> None:
    """Give these pages back: the range reads as zeroes, for whoever maps it too. ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(size)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
