# SPDX-License-Identifier: Apache-2.0
"""What a program donates to a simulated driver, really booted: it is copied to a machine of carrier ``qemu``."""

from __future__ import annotations

import contextlib
import io
import os
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from enclavekit import eif
from enclavekit.errors import Error
from enclavekit.hypervisor.contract import Carrier, Enclave, ImageKind, LaunchSpec, Mode
from enclavekit.image.kernel import image_discovery
from enclavekit.testing.nitro_driver import Slot
from enclavekit.testing.user_memory import ProcessMemory

COPY_SIZE = 1 << 20
READ_SIZE = 1 << 16


class DonatedFile(io.RawIOBase):
    """Enclave memory, ranges one after another, as a file that begins at ``offset`` and has ``size`` bytes."""

    def __init__(self, memory: ProcessMemory, ranges: Sequence[tuple[int, int]], offset: int, size: int) -> None:
        super().__init__()
        self._memory, self._ranges, self._offset, self._size = memory, ranges, offset, size
        self._position = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """As files have it."""
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Up to the end of a range."""
        wanted = min(len(buffer), self._size - self._position)
        place = self._offset + self._position
        for address, length in self._ranges:
            if place < length:
                count = max(min(wanted, length - place), 0)
                if count:
                    buffer[:count] = self._memory.read(address + place, count)
                self._position += count
                return count
            place -= length
        return 0


@dataclass(slots=True)
class _Running:
    slot: Slot
    enclave: Enclave


class QemuMachines:
    """Machines for the slots of a simulated driver (``simulate.Machines``). ``console`` gets what debug mode shows."""

    def __init__(
        self, carrier: Carrier, directory: Path, *, console: Callable[[bytes], None], warn: Callable[[str], None]
    ) -> None:
        self._carrier = carrier
        self._directory = directory
        self._console = console
        self._warn = warn
        self._running: list[_Running] = []
        self._stillborn: list[Slot] = []

    def boot(self, slot: Slot) -> None:
        """As with a real hypervisor, an image that is none only shows by an enclave that ends."""
        try:
            self._running.append(_Running(slot, self._start(slot)))
        except (Error, OSError) as error:
            self._warn(f"the enclave does not start: {error}")
            self._stillborn.append(slot)

    def _start(self, slot: Slot) -> Enclave:
        memory = ProcessMemory(slot.mm)
        offset = slot.image_load_offset(ImageKind.EIF)
        room = slot.memory_size - offset
        header = eif.Header.parse(io.BufferedReader(DonatedFile(memory, slot.ranges, offset, room)).read(548))
        ends = [at + 12 + size for at, size in zip(header.offsets, header.sizes, strict=True)]
        size = min(max(ends, default=0), room)
        file = cast(BinaryIO, io.BufferedReader(DonatedFile(memory, slot.ranges, offset, size), READ_SIZE))
        image = eif.read(file)
        directory = self._directory / f"{slot.uid:x}"
        directory.mkdir(mode=0o700)
        spec = LaunchSpec(
            enclave_id=f"{slot.uid & 0xFFFF_FFFF:08x}",
            memory=slot.memory_size,
            cpus=len(slot.vcpus),
            image_size=image.size,
            discovery=image_discovery(file, image),
            directory=directory,
        )
        enclave = self._carrier.create(spec)
        try:
            place = 0
            for region in enclave.allocate(slot.memory_size):
                whole = DonatedFile(memory, slot.ranges, region.offset, region.size)
                while place < region.offset + region.size:
                    start = place - region.offset
                    place += whole.readinto(region.buffer[start : start + COPY_SIZE])
                enclave.set_user_memory_region(region)
            for _ in slot.vcpus:
                enclave.add_vcpu()
            enclave.start(mode=Mode.DEBUG if slot.debug else Mode.PRODUCTION, cid=slot.cid)
        except BaseException:
            enclave.close()
            raise
        return enclave

    def halt(self, slot: Slot) -> None:
        """The program has closed it."""
        for running in [one for one in self._running if one.slot is slot]:
            self._running.remove(running)
            running.enclave.close()

    def descriptors(self) -> Sequence[int]:
        """Ends and consoles."""
        consoles = [running.enclave.console() for running in self._running]
        return [*(one.enclave.fileno() for one in self._running), *(fd for fd in consoles if fd is not None)]

    def turn(self) -> None:
        """Carry output, tell the driver of ends."""
        for slot in self._stillborn:
            slot.end()
        self._stillborn.clear()
        for running in list(self._running):
            ended = _has_ended(running.enclave)
            more = self._read_console(running)
            while ended and more:
                more = self._read_console(running)
            if ended:
                failure = running.enclave.failure()
                if failure is not None:
                    self._warn(failure)
                self._running.remove(running)
                running.enclave.close()
                running.slot.end()

    def _read_console(self, running: _Running) -> bool:
        console = running.enclave.console()
        data = b""
        if console is not None:
            with contextlib.suppress(OSError):
                data = os.read(console, READ_SIZE)
        if data and running.slot.debug:
            self._console(data)
        return bool(data)

    def next_turn_s(self) -> float | None:
        """At once, for an enclave that did not start."""
        return 0.0 if self._stillborn else None


def _has_ended(enclave: Enclave) -> bool:
    poller = select.poll()
    poller.register(enclave.fileno(), 0)
    return bool(poller.poll(0))
