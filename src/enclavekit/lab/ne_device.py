# SPDX-License-Identifier: Apache-2.0
"""The Nitro Enclaves PCI device: registers, one command at a time, two interrupts. Behind it are slots.

Source: linux: drivers/virt/nitro_enclaves/ne_pci_dev.c, for what a driver does with it. A program of the parent reaches
all of this, so every value is anybody's: none is refused by ending the connection, all are answered or ignored.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from enclavekit.lab.dma import Piece
from enclavekit.lab.ne_registers import (
    COMMAND_OFFSET,
    CONFIG_SIZE,
    DATA_SIZE,
    EVENT_VECTOR,
    MSIX_BAR,
    MSIX_BAR_SIZE,
    MSIX_CONTROL_HIGH,
    NE_COMMAND,
    NE_ENABLE,
    NE_EVTCNT,
    NE_RECV_DATA,
    NE_SEND_DATA,
    NE_VERSION,
    REGISTER_BAR,
    REGISTER_BAR_SIZE,
    REPLY_VECTOR,
    REQUESTS,
    VERSION_MAX,
    Command,
    Reply,
    config_space,
)
from enclavekit.lab.ne_slots import Limits, Refused, Slots
from enclavekit.lab.slots import Hypervisor
from enclavekit.lab.vfio_user_message import CONFIG_REGION


class Later(Protocol):
    """The thread that the device is in; ``virtio.loop.Loop`` is one."""

    def call(self, call: Callable[[], None]) -> bool:
        """From any thread: call soon in the device's. False once that has ended."""

    def call_later(self, delay_s: float, call: Callable[[], None]) -> object:
        """Call once, after a while."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A command that goes wrong, for tests of those who use the driver.

    It is refused with ``errno``, or, if that is 0, done; ``delay_s`` later. With ``lost`` it is never heard of.
    """

    errno: int = 0
    delay_s: float = 0.0
    lost: bool = False


class NeDevice:
    """A ``vfio_user.PciDevice``. ``find`` looks the parent's memory up, ``signal`` interrupts it."""

    regions: Mapping[int, int] = MappingProxyType(
        {MSIX_BAR: MSIX_BAR_SIZE, REGISTER_BAR: REGISTER_BAR_SIZE, CONFIG_REGION: CONFIG_SIZE}
    )

    def __init__(
        self,
        hypervisor: Hypervisor,
        find: Callable[[int, int], list[Piece]],
        signal: Callable[[int], None],
        later: Later,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.faults: list[tuple[Command, Fault]] = []
        """The next such command goes wrong; more of them one after another."""
        self._signal = signal
        self._later = later
        self._slots = Slots(hypervisor, find, self._event, self.limits)
        self._config = bytearray(config_space())
        self._registers = bytearray(REGISTER_BAR_SIZE)
        self._transaction = 0

    # As a PCI device

    def read(self, region: int, offset: int, size: int) -> bytes:
        """The MSI-X table is QEMU's affair: what is here of it is never looked at."""
        if region == CONFIG_REGION:
            return bytes(self._config[offset : offset + size])
        if region == REGISTER_BAR:
            return bytes(self._registers[offset : offset + size])
        return bytes(size)

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Of any width: a register is written when all of its bytes are. What cannot be written to stays as it is."""
        end = offset + len(data)
        if region == CONFIG_REGION:
            for place in (COMMAND_OFFSET, COMMAND_OFFSET + 1, MSIX_CONTROL_HIGH):
                if offset <= place < end:
                    self._config[place] = data[place - offset]
        elif region == REGISTER_BAR:
            begin, stop = max(offset, NE_SEND_DATA), min(end, NE_SEND_DATA + DATA_SIZE)
            if begin < stop:
                self._registers[begin:stop] = data[begin - offset : stop - offset]
            for place, size, action in (
                (NE_ENABLE, 1, self._enable),
                (NE_VERSION, 2, self._choose_version),
                (NE_COMMAND, 4, self._command),
            ):
                if offset <= place and place + size <= end:
                    action(int.from_bytes(data[place - offset : place - offset + size], "little"))

    def reset(self) -> None:
        """As after power-on: no enclave is left."""
        self._off()
        self._registers[:] = bytes(REGISTER_BAR_SIZE)
        self._config[:] = config_space()

    def close(self) -> None:
        """The parent is gone."""
        self._off()

    def ended(self, uid: int) -> None:
        """``slots.Ended``: from any thread."""
        self._later.call(lambda: self._slots.ended(uid))

    # Registers

    def _enable(self, value: int) -> None:
        if value == 0:
            self._off()
        self._registers[NE_ENABLE] = value & 1

    def _off(self) -> None:
        self._registers[NE_ENABLE] = 0
        self._transaction += 1  # answers that are still to come are for nobody
        self._slots.clear()

    def _choose_version(self, value: int) -> None:
        """Others than the one that there is are answered with it."""
        del value
        self._registers[NE_VERSION : NE_VERSION + 2] = VERSION_MAX.to_bytes(2, "little")

    def _command(self, number: int) -> None:
        """One at a time: the one before is not answered any more."""
        if not self._registers[NE_ENABLE]:
            return
        self._transaction += 1
        transaction = self._transaction
        try:
            command = Command(number)
        except ValueError:
            self._reply(transaction, Reply(rc=-errno.EINVAL))
            return
        request = bytes(self._registers[NE_SEND_DATA : NE_SEND_DATA + REQUESTS[command].size])
        fault = self._fault(command)
        if fault is None:
            self._do(transaction, command, request)
        elif not fault.lost:
            self._later.call_later(fault.delay_s, lambda: self._do(transaction, command, request, fault.errno))

    def _fault(self, command: Command) -> Fault | None:
        for index, (failing, fault) in enumerate(self.faults):
            if failing is command:
                del self.faults[index]
                return fault
        return None

    def _do(self, transaction: int, command: Command, request: bytes, number: int = 0) -> None:
        """``number``: to be refused with."""
        if transaction != self._transaction:
            return  # it came late
        words = REQUESTS[command].unpack(request)
        try:
            if number:
                raise Refused(number)
            if command is Command.ENCLAVE_START:
                self._start(transaction, words)
                return
            reply = self._slots.do(command, words)
        except Refused as refused:
            reply = Reply(rc=-refused.number)
        self._reply(transaction, reply)

    def _start(self, transaction: int, words: tuple[int, ...]) -> None:
        uid, _, flags = words

        def answer(rc: int, cid: int) -> None:
            self._later.call(lambda: self._reply(transaction, self._slots.started(uid, rc, cid, flags)))

        self._slots.start(words, answer)

    def _reply(self, transaction: int, reply: Reply) -> None:
        if transaction != self._transaction:
            return  # the driver has given up waiting, or has switched the device off
        self._registers[NE_RECV_DATA : NE_RECV_DATA + DATA_SIZE] = bytes(reply).ljust(DATA_SIZE, b"\0")
        self._count(NE_EVTCNT)
        self._signal(REPLY_VECTOR)

    def _event(self) -> None:
        self._count(NE_EVTCNT + 2)
        self._signal(EVENT_VECTOR)

    def _count(self, place: int) -> None:
        value = int.from_bytes(self._registers[place : place + 2], "little") + 1 & 0xFFFF
        self._registers[place : place + 2] = value.to_bytes(2, "little")
