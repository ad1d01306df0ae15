# SPDX-License-Identifier: Apache-2.0
"""16550A serial port at 0x3f8: FIFO, interrupts, no modem.

Source: TI PC16550D data sheet; linux: include/uapi/linux/serial_reg.h. What is sent is gone at once, so the transmitter
is always empty; its interrupt comes up anew after every byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

COM1 = 0x3F8
COM1_IRQ = 4
PORTS = 8

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH = range(PORTS)
"""DATA and IER are the divisor while LCR has DLAB; IIR is FCR when written."""

IER_RECEIVED, IER_TRANSMITTER_EMPTY = 1, 2
IIR_NONE, IIR_TRANSMITTER_EMPTY, IIR_RECEIVED, IIR_TIMEOUT = 1, 2, 4, 12
IIR_FIFO = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER = 1, 2
LCR_DLAB = 0x80
MCR_LOOPBACK, MCR_OUT2 = 0x10, 8
LSR_DATA_READY, LSR_OVERRUN, LSR_TRANSMITTER_EMPTY = 1, 2, 0x60
MSR_CONNECTED = 0xB0
"""Carrier, data set ready, clear to send."""

FIFO_SIZE = 16
TRIGGER_LEVELS = (1, 4, 8, 14)


class Serial:
    """``send`` gets each byte written, ``set_irq`` the level of the line, ``on_room`` is told when input can go on.

    Not thread-safe.
    """

    def __init__(
        self, send: Callable[[bytes], None], set_irq: Callable[[bool], None], on_room: Callable[[], None]
    ) -> None:
        self._send = send
        self._set_irq = set_irq
        self._on_room = on_room
        self._input: deque[int] = deque()
        self._divisor = [12, 0]  # 9600 baud, as after a reset
        self._ier = self._lcr = self._mcr = self._scratch = self._fcr = 0
        self._overrun = 0
        self._transmitter_told = False
        """The guest has been told, by IIR, that the transmitter is empty."""
        self._level = False

    @property
    def room(self) -> int:
        """Bytes of input that ``receive`` would take."""
        return (FIFO_SIZE if self._fcr & FCR_ENABLE else 1) - len(self._input)

    def receive(self, data: bytes) -> None:
        """Input; what finds no room is lost, and the guest is told."""
        taken = data[: self.room]
        self._input += taken
        if len(taken) < len(data):
            self._overrun = LSR_OVERRUN
        self._update()

    def read(self, register: int) -> int:
        """One of eight."""
        value = self._read(register)
        self._update()
        return value

    def _read(self, register: int) -> int:
        if self._lcr & LCR_DLAB and register in (DATA, IER):
            return self._divisor[register]
        match register:
            case 0:
                value = self._input.popleft() if self._input else 0
                self._on_room()
            case 1:
                value = self._ier
            case 2:
                cause = self._cause()
                if cause == IIR_TRANSMITTER_EMPTY:
                    self._transmitter_told = True
                value = cause | (IIR_FIFO if self._fcr & FCR_ENABLE else 0)
            case 3:
                value = self._lcr
            case 4:
                value = self._mcr
            case 5:
                value = LSR_TRANSMITTER_EMPTY | self._overrun | (LSR_DATA_READY if self._input else 0)
                self._overrun = 0
            case 6:
                # In loopback the outputs come back as inputs, crosswise.
                mcr = self._mcr
                looped = (mcr & 1) << 5 | (mcr & 2) << 3 | (mcr & 4) << 4 | (mcr & 8) << 4
                value = looped if mcr & MCR_LOOPBACK else MSR_CONNECTED
            case _:
                value = self._scratch
        return value

    def write(self, register: int, value: int) -> None:
        """One of eight."""
        if self._lcr & LCR_DLAB and register in (DATA, IER):
            self._divisor[register] = value
            return
        match register:
            case 0:
                if self._mcr & MCR_LOOPBACK:
                    self.receive(bytes([value]))
                else:
                    self._send(bytes([value]))
                self._set_level(False)  # an edge for each byte
                self._transmitter_told = False
            case 1:
                if value & ~self._ier & IER_TRANSMITTER_EMPTY:
                    self._transmitter_told = False
                self._ier = value & 0xF
            case 2:
                if value & FCR_CLEAR_RECEIVER or (value ^ self._fcr) & FCR_ENABLE:
                    self._input.clear()
                    self._on_room()
                self._fcr = value & 0xC9
            case 3:
                self._lcr = value
            case 4:
                self._mcr = value & 0x1F
            case 7:
                self._scratch = value
            case _:
                pass  # LSR and MSR are for reading
        self._update()

    def _cause(self) -> int:
        if self._input and self._ier & IER_RECEIVED:
            wanted = TRIGGER_LEVELS[self._fcr >> 6] if self._fcr & FCR_ENABLE else 1
            return IIR_RECEIVED if len(self._input) >= wanted else IIR_TIMEOUT
        if self._ier & IER_TRANSMITTER_EMPTY and not self._transmitter_told:
            return IIR_TRANSMITTER_EMPTY
        return IIR_NONE

    def _update(self) -> None:
        self._set_level(self._cause() != IIR_NONE)

    def _set_level(self, level: bool) -> None:
        if level != self._level:
            self._level = level
            self._set_irq(level)
