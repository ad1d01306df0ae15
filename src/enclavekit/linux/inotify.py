# SPDX-License-Identifier: Apache-2.0
"""inotify(7): to be told when a file is removed from a directory."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from struct import Struct

IN_DELETE = 0x0000_0200
IN_MOVED_FROM = 0x0000_0040
IN_CLOEXEC = os.O_CLOEXEC

_EVENT = Struct("@iIII")  # wd, mask, cookie, len; then len bytes of a NUL-padded name
READ_SIZE = 1 << 16


class RemovalWatch:
    """Watches one directory. OSError where the kernel refuses."""

    def __init__(self, directory: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(IN_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "inotify")
        if libc.inotify_add_watch(self._fd, os.fsencode(directory), IN_DELETE | IN_MOVED_FROM) < 0:
            number = ctypes.get_errno()
            os.close(self._fd)
            raise OSError(number, os.strerror(number), os.fspath(directory))

    def wait(self) -> set[str]:
        """Until something is removed, or moved away; the names."""
        data = os.read(self._fd, READ_SIZE)
        names, position = set(), 0
        while position + _EVENT.size <= len(data):
            *_, size = _EVENT.unpack_from(data, position)
            start = position + _EVENT.size
            names.add(os.fsdecode(data[start : start + size].rstrip(b"\0")))
            position = start + size
        return names

    def close(self) -> None:
        """Watch no more."""
        os.close(self._fd)
