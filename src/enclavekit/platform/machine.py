# SPDX-License-Identifier: Apache-2.0
"""What the guest is told about its machine: memory map, CPUs, serial port and virtio-mmio windows.

QEMU's microvm is the machine described here (QEMU: include/hw/i386/microvm.h); a carrier with other addresses makes
other values of the same types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

MIB = 1 << 20
GIB = 1 << 30

IMAGE_LOAD_OFFSET = 8 * MIB
"""Where an EIF starts in enclave memory (linux: NE_IMAGE_LOAD_OFFSET answers this for NE_EIF_IMAGE)."""

LOW_MEMORY_LIMIT = 3 * GIB
"""RAM goes up to here, then on from 4 GiB; the gap holds devices and the ROM."""

HIGH_MEMORY_START = 4 * GIB
EBDA_START = 0x9FC00
"""Base memory ends here, by custom: what a BIOS would keep for itself starts."""

MAX_CPUS = 64
"""The MP table and the MADT have room for more; more has not been tried."""


class Platform(StrEnum):
    """Whose machine a local one is like: our own, where every kernel finds what it needs, or a real enclave's."""

    DEFAULT = "default"
    NITRO = "nitro"


ZERO_PAGE = 0x10000
"""struct boot_params; with ``realmode`` the kernel's 16-bit setup lies there, its heap and stack above."""
START_INFO = 0x6000
"""PVH's hvm_start_info."""
CMDLINE = 0x20000
CMDLINE_LIMIT = 0x10000


class BootProtocol(StrEnum):
    """How the kernel is found and entered (docs/how-an-enclave-boots.md)."""

    EIF = "eif"
    LINUX = "linux"
    PVH = "pvh"
    REALMODE = "realmode"


class E820Type(IntEnum):
    """Kinds of address ranges (ACPI 6.5 §15, linux: arch/x86/include/asm/e820/types.h)."""

    RAM = 1
    RESERVED = 2


@dataclass(frozen=True, slots=True)
class E820Entry:
    """One range of the guest physical address space, in bytes."""

    address: int
    size: int
    type: E820Type


@dataclass(frozen=True, slots=True)
class VirtioWindow:
    """One virtio-mmio transport: its registers and its interrupt (ISA IRQ number = GSI)."""

    address: int
    size: int
    irq: int

    def cmdline(self) -> str:
        """As the kernel parameter of CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES."""
        return f"virtio_mmio.device={self.size}@0x{self.address:x}:{self.irq}"


@dataclass(frozen=True, slots=True)
class Ioapic:
    """The I/O APIC that the interrupts go through."""

    id: int
    address: int = 0xFEC0_0000


MICROVM_TRANSPORTS = 8


def microvm_windows(count: int) -> tuple[VirtioWindow, ...]:
    """The windows of microvm's first ``count`` virtio devices, with ``acpi=off``.

    Eight windows of 512 bytes at 0xfeb00000, IRQs from 5, are filled from the top.
    """
    if not 0 <= count <= MICROVM_TRANSPORTS:
        raise ValueError(f"microvm has {MICROVM_TRANSPORTS} virtio transports, not {count}")
    slots = range(MICROVM_TRANSPORTS - 1, MICROVM_TRANSPORTS - 1 - count, -1)
    return tuple(VirtioWindow(0xFEB0_0000 + 512 * slot, 512, 5 + slot) for slot in slots)


ENCLAVE_WINDOW = 0x1000


def enclave_windows(count: int) -> tuple[VirtioWindow, ...]:
    """The windows of the first ``count`` virtio devices of a real enclave: 4 KiB each at 0xd0000000, IRQs from 5."""
    return tuple(VirtioWindow(0xD000_0000 + ENCLAVE_WINDOW * slot, ENCLAVE_WINDOW, 5 + slot) for slot in range(count))


def memory_map(memory: int) -> tuple[E820Entry, ...]:
    """The E820 map of a machine with ``memory`` bytes of RAM."""
    low_end = low_memory_end(memory)
    entries = [
        E820Entry(0, EBDA_START, E820Type.RAM),
        E820Entry(EBDA_START, MIB - EBDA_START, E820Type.RESERVED),
        E820Entry(MIB, low_end - MIB, E820Type.RAM),
    ]
    if memory > LOW_MEMORY_LIMIT:
        entries.append(E820Entry(HIGH_MEMORY_START, memory - LOW_MEMORY_LIMIT, E820Type.RAM))
    return tuple(entries)


def low_memory_end(memory: int) -> int:
    """Where RAM below 4 GiB ends, exclusive, of a machine with ``memory`` bytes."""
    return min(memory, LOW_MEMORY_LIMIT)


def device_parameters(windows: Sequence[VirtioWindow]) -> list[str]:
    """Kernel parameters that describe the devices to a kernel that takes them from its command line."""
    return [window.cmdline() for window in windows]
