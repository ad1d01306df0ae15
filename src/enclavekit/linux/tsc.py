# SPDX-License-Identifier: Apache-2.0
"""The time stamp counter of this machine: its value and its speed. x86_64 only.

QEMU's TCG hands the host's counter to its guests, so the host's speed is theirs.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time

# rdtsc; shl rdx, 32; or rax, rdx; ret (Intel SDM vol. 2, RDTSC)
RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")

SHORTEST_INTERVAL_S = 0.05
"""Two readings this far apart give the speed to better than 0.1 %."""


class TscClock:
    """Measures the counter's speed between its making and the call of ``khz``."""

    def __init__(self) -> None:
        self._page: mmap.mmap | None = None
        try:
            self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        except OSError:  # some systems forbid memory that is writable and executable
            return
        if platform.machine() != "x86_64":
            return
        self._page.write(RDTSC)
        anchor = ctypes.c_char.from_buffer(self._page)
        self._read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
        self._start = self._sample()

    def _sample(self) -> tuple[int, int]:
        """(nanoseconds, counter), from the tightest of a few tries: the machine may be busy."""
        tries = []
        for _ in range(5):
            before = time.monotonic_ns()
            count = self._read()
            after = time.monotonic_ns()
            tries.append((after - before, (before + after) // 2, count))
        return min(tries)[1:]

    def khz(self) -> int | None:
        """The speed in kHz, waiting until enough time has passed since the start; None where it cannot be measured."""
        if not hasattr(self, "_start"):
            return None
        passed_s = (time.monotonic_ns() - self._start[0]) / 1e9
        time.sleep(max(0.0, SHORTEST_INTERVAL_S - passed_s))
        end = self._sample()
        return (end[1] - self._start[1]) * 1_000_000 // (end[0] - self._start[0])
