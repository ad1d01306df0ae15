# SPDX-License-Identifier: Apache-2.0
"""What the NE device and the hypervisor behind it say to each other: slots, their memory, and what becomes of them.

The device (``ne_device``) knows registers and commands; the hypervisor knows memory, images and virtual machines.
Each is tested with a fake of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol


class SlotState(IntEnum):
    """As the device tells them (linux: drivers/virt/nitro_enclaves/ne_misc_dev.h)."""

    INIT = 0
    RUNNING = 2
    STOPPED = 0xFFFF


@dataclass(frozen=True, slots=True)
class DonatedRange:
    """Parent memory that a slot has been given. The parent's RAM is a memfd shared with us."""

    address: int
    """Where the parent sees it, guest physical. What the parent donates is of whole 2 MiB, but may lie in pieces."""
    size: int
    """Bytes."""
    fd: int
    """The memfd. It stays open until the parent has gone and all slots are free; who needs it longer duplicates it."""
    offset: int
    """Where in the memfd it begins, bytes."""


@dataclass(slots=True)
class Slot:
    """An enclave as the parent made it. Its memory is the ranges one after the other, in the order of donation."""

    uid: int
    memory: list[DonatedRange] = field(default_factory=list)
    cpus: list[int] = field(default_factory=list)
    """The parent's numbers of them."""
    state: SlotState = SlotState.INIT
    flags: int = 0
    """As NE_START_ENCLAVE has them: 1 is debug mode."""
    cid: int = 0


Answer = Callable[[int, int], None]
"""How a start went: 0 or a negative errno, and the CID. Called once, from any thread."""


class Hypervisor(Protocol):
    """What the device asks for. All are called in the device's thread and none may block for long."""

    def start(self, slot: Slot, cid: int, flags: int, answer: Answer) -> None:
        """Boot it, with this CID or, at 0, any. Later, when it ends by itself, the device is to be told: ``Ended``."""

    def stop(self, slot: Slot) -> None:
        """End the machine, if it runs. Does not touch the memory."""

    def free(self, slot: Slot) -> None:
        """The parent gets its pages back, zeroed. A slot that still runs is stopped first."""


Ended = Callable[[int], None]
"""The enclave of the slot with this uid has ended without being asked to. From any thread."""
