# SPDX-License-Identifier: Apache-2.0
"""The small chips at fixed ports: the keyboard controller, by which kernels reset, and the clock.

Sources: IBM PC AT Technical Reference (8042, MC146818); linux: arch/x86/kernel/reboot.c, include/linux/mc146818rtc.h.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime

I8042_DATA, I8042_COMMAND = 0x60, 0x64
CMOS = 0x70
"""Index; data is the port after it."""

OUTPUT_FULL, SYSTEM_FLAG = 1, 4
SELF_TEST_PASSED, PORT_TEST_PASSED = 0x55, 0x00


class I8042:
    """A keyboard controller without keyboard: it answers what drivers ask to see it, and ``reset`` is called."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._output: deque[int] = deque(maxlen=16)
        self._control = 0x74  # both ports off, as long as nobody wants them
        self._outport = 0x01  # bit 0: the reset line, active low
        self._expects: int | None = None

    @property
    def status(self) -> int:
        """Whether there is data."""
        return SYSTEM_FLAG | (OUTPUT_FULL if self._output else 0)

    def read_data(self) -> int:
        """The next answer."""
        return self._output.popleft() if self._output else 0

    def write_data(self, value: int) -> None:
        """A byte that belongs to a command; there is no keyboard that would take another."""
        expects, self._expects = self._expects, None
        if expects == 0x60:
            self._control = value
        elif expects == 0xD1:
            self._outport = value
            if not value & 1:
                self._reset()

    def command(self, value: int) -> None:
        """What drivers ask to see it, and resets."""
        self._expects = None
        answers = {0x20: self._control, 0xAA: SELF_TEST_PASSED, 0xAB: PORT_TEST_PASSED, 0xD0: self._outport}
        if value in answers:
            self._output.append(answers[value])
        elif value in (0x60, 0xD1):
            self._expects = value
        elif value >= 0xF0 and not value & 1:  # pulses of the lines whose bits are clear: 0xfe is reset alone
            self._reset()


class Cmos:
    """128 bytes, the first of them a clock that tells UTC, in BCD and 24 hours."""

    STATUS_A, STATUS_B, STATUS_C, STATUS_D, CENTURY = 0x0A, 0x0B, 0x0C, 0x0D, 0x32

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self._index = 0
        self._memory = bytearray(128)

    def read(self, offset: int) -> int:
        """Port 1: the byte that was chosen."""
        if offset == 0:
            return 0xFF  # cannot be read
        now = self._now()
        clock = {
            0x00: now.second,
            0x02: now.minute,
            0x04: now.hour,
            0x06: now.isoweekday() % 7 + 1,
            0x07: now.day,
            0x08: now.month,
            0x09: now.year % 100,
            self.CENTURY: now.year // 100,
        }
        if self._index in clock:
            value = clock[self._index]
            return value // 10 << 4 | value % 10
        fixed = {self.STATUS_A: 0x26, self.STATUS_B: 0x02, self.STATUS_C: 0x00, self.STATUS_D: 0x80}
        return fixed.get(self._index, self._memory[self._index])

    def write(self, offset: int, value: int) -> None:
        """Port 0: choose a byte; 1: set it. The clock cannot be set."""
        if offset == 0:
            self._index = value & 0x7F
        else:
            self._memory[self._index] = value
