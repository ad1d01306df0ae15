# SPDX-License-Identifier: Apache-2.0
"""A log that is bounded and never fails: two files of at most LIMIT bytes, the older one with .1 behind its name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

LIMIT = 4 << 20
"""Bytes."""
POLL_S = 0.1
READ_SIZE = 1 << 16


class LogFile:
    """Appended to. What a full disk does not take is counted, and said as soon as there is room again."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self._path = path
        self._limit = limit
        self._fd: int | None = None
        self._size = 0
        self._lost = 0

    def write(self, data: bytes) -> None:
        """All of it, or not at all."""
        try:
            if self._fd is None or self._size + len(data) > self._limit:
                self._rotate()
            if self._lost:
                self._append(b"\n[%d bytes lost here: no room]\n" % self._lost)
                self._lost = 0
            self._append(data)
        except OSError:
            self._lost += len(data)

    def close(self) -> None:
        """No more."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _rotate(self) -> None:
        if self._fd is not None:
            self.close()
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._size = os.fstat(self._fd).st_size

    def _append(self, data: bytes) -> None:
        assert self._fd is not None  # noqa: S101 - _rotate opened it
        view = memoryview(data)
        while view:
            count = os.write(self._fd, view)
            self._size += count
            view = view[count:]


def read_log(path: Path, *, more: Callable[[], bool] = lambda: False) -> Iterator[bytes]:
    """What both files hold, and what comes as long as there is ``more`` to come; empty chunks while nothing does.

    A file that is rotated or moved while it is read is read to its end first.
    """
    with suppress(FileNotFoundError), path.with_name(f"{path.name}.1").open("rb") as older:
        yield from iter(partial(older.read, READ_SIZE), b"")
    file: BinaryIO | None = None
    try:
        while True:
            # Asked before reading: what was written before the end is not missed.
            goes_on = more()
            if file is None:
                with suppress(FileNotFoundError):
                    file = path.open("rb")
            if file is not None:
                last = not _is_at(file, path)
                yield from iter(partial(file.read, READ_SIZE), b"")
                if last:
                    file.close()
                    file = None
                    if path.exists():
                        continue
            if not goes_on:
                return
            yield b""
            time.sleep(POLL_S)
    finally:
        if file is not None:
            file.close()


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    ours = os.fstat(file.fileno())
    return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)
