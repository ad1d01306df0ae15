# SPDX-License-Identifier: Apache-2.0
"""Interrupt vectors of a device: each an eventfd of the client's, as long as the guest has it enabled."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from enclavekit.errors import ProtocolError

EVENTFD = "anon_inode:[eventfd]"


class Interrupts:
    """``count`` vectors, and nobody asks for others. What is signalled while nobody listens is lost, as in hardware."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._eventfds: list[int | None] = [None] * count

    def set(self, start: int, fds: Sequence[int]) -> None:
        """Vectors from ``start`` on. The descriptors stay the caller's; duplicates are kept, older ones are closed."""
        for fd in fds:
            if str(Path(f"/proc/self/fd/{fd}").readlink()) != EVENTFD:
                raise ProtocolError("vfio-user: what comes along for an interrupt is no eventfd")
        for vector, fd in enumerate(fds, start):
            self.clear(vector, 1)
            try:
                kept = os.dup(fd)
            except OSError as error:
                raise ProtocolError(
                    f"vfio-user: cannot keep an eventfd open: {(error.strerror or str(error)).lower()}"
                ) from error
            os.set_blocking(kept, False)
            self._eventfds[vector] = kept

    def clear(self, start: int, count: int) -> None:
        """Nobody listens to these any more."""
        for vector in range(start, start + count):
            fd, self._eventfds[vector] = self._eventfds[vector], None
            if fd is not None:
                os.close(fd)

    def signal(self, vector: int) -> None:
        """Interrupt the guest."""
        fd = self._eventfds[vector]
        if fd is None:
            return
        with contextlib.suppress(BlockingIOError):  # full of signals already
            os.eventfd_write(fd, 1)

    def close(self) -> None:
        """Close all. Twice does no harm."""
        self.clear(0, self.count)
