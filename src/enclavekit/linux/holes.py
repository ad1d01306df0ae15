# SPDX-License-Identifier: Apache-2.0
"""Data of a file made a hole (fallocate(2), linux: include/uapi/linux/falloc.h)."""

from __future__ import annotations

import ctypes
import os

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02


def punch(fd: int, offset: int, size: int) -> None:
    """Give these pages back: the range reads as zeroes, also for whoever maps it. ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(size)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
