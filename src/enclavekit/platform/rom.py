# SPDX-License-Identifier: Apache-2.0
"""The ROM at the reset vector: boot description, firmware tables, loader, and a jump, composed for each launch.

64 KiB, mapped below 4 GiB and again at 0xf0000, where kernels scan for firmware tables:

    0x0000  boot description, read by guest/loader/loader.c
    0x1000  command-line suffix
    0x2000  MP table, or 0x3000 ACPI tables: one of the two
    0x7000  SMBIOS: entry point and structures
    0x8000  loader
    0xfff0  reset vector: E9 and a 16-bit displacement
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from struct import Struct, pack

from enclavekit.eif import Discovery
from enclavekit.errors import LaunchError
from enclavekit.platform import acpi, mptable, smbios
from enclavekit.platform.machine import (
    BootProtocol,
    E820Entry,
    Ioapic,
    VirtioWindow,
    device_parameters,
    low_memory_end,
    memory_map,
)

ROM_SIZE = 0x10000
ROM_ALIAS = 0xF0000
"""Where the ROM is seen below 1 MiB."""

SUFFIX_OFFSET = 0x1000
MAX_SUFFIX_SIZE = 0x800
MP_TABLE_OFFSET = 0x2000
ACPI_OFFSET = 0x3000
SMBIOS_OFFSET = 0x7000
LOADER_OFFSET = 0x8000
MAX_LOADER_SIZE = 0x2000
RESET_VECTOR_OFFSET = 0xFFF0

BOOT_DESCRIPTION = Struct(
    "<"  #  little-endian, no padding
    "4s"  # 0x00 magic, "EKBD"
    "I"  #  0x04 version
    "I"  #  0x08 boot protocol
    "I"  #  0x0c image: guest physical address
    "I"  #  0x10 image: size in bytes
    "I"  #  0x14 end of RAM below 4 GiB
    "I"  #  0x18 ACPI RSDP, 0 for none
    "I"  #  0x1c command-line suffix: offset in the ROM
    "I"  #  0x20 command-line suffix: size in bytes
    "I"  #  0x24 laid down by the host: address of the kernel's first instruction
    "I"  #  0x28 laid down by the host: address of zero page or start info
    "I"  #  0x2c count of E820 entries, which follow
)
E820 = Struct(
    "<"
    "Q"  # 0x0 address
    "Q"  # 0x8 size in bytes
    "I"  # 0x10 type
)


PROTOCOLS = {BootProtocol.EIF: 0, BootProtocol.LINUX: 1, BootProtocol.PVH: 2, BootProtocol.REALMODE: 3}
"""As guest/loader/loader.h numbers them."""


@dataclass(frozen=True, slots=True)
class Boot:
    """All that a ROM says: memory and image in bytes, devices in the order in which the carrier plugs them."""

    memory: int
    cpus: int
    image_base: int
    image_size: int
    windows: Sequence[VirtioWindow]
    discovery: Discovery
    parameters: Sequence[str] = ()
    """More for the command line's suffix, which is not measured."""
    ioapic: Ioapic = Ioapic(0)  # noqa: RUF009 - frozen
    protocol: BootProtocol = BootProtocol.EIF
    entry: int = 0
    """Where the host has laid down the kernel's first instruction; unless the image is an EIF for the loader."""
    argument: int = 0
    """The zero page, or PVH's start info."""
    enclave_id: str = ""
    """What SMBIOS says of it."""

    @property
    def rsdp(self) -> int:
        """Address of the ACPI root pointer, 0 for none."""
        return ROM_ALIAS + ACPI_OFFSET if self.discovery is Discovery.ACPI else 0

    def suffix(self) -> bytes:
        """What is appended to the measured command line."""
        devices = device_parameters(self.windows) if self.discovery is Discovery.CMDLINE else []
        return "".join(f" {parameter}" for parameter in [*devices, *self.parameters]).encode("ascii")


def loader() -> bytes:
    """The loader's code, as the build hook made it from guest/loader."""
    return files("enclavekit.platform").joinpath("loader.bin").read_bytes()


def compose(boot: Boot, code: bytes) -> bytes:
    """The 64 KiB ROM for one launch, with ``code`` as its loader."""
    rom = bytearray(ROM_SIZE)

    def place(offset: int, data: bytes, limit: int, what: str) -> None:
        if len(data) > limit:
            raise LaunchError(f"ROM: {what} takes {len(data)} bytes, have room for {limit}")
        rom[offset : offset + len(data)] = data

    suffix = boot.suffix()
    place(0, _description(boot, len(suffix), memory_map(boot.memory)), SUFFIX_OFFSET, "boot description")
    place(SUFFIX_OFFSET, suffix, MAX_SUFFIX_SIZE, "command-line suffix")
    if boot.discovery is Discovery.CMDLINE:
        table = mptable.configuration_table(boot.cpus, boot.ioapic)
        pointer = mptable.floating_pointer(ROM_ALIAS + MP_TABLE_OFFSET + 16)
        place(MP_TABLE_OFFSET, pointer + table, ACPI_OFFSET - MP_TABLE_OFFSET, "MP table")
    else:
        tables = acpi.tables(ROM_ALIAS + ACPI_OFFSET, boot.cpus, boot.ioapic, boot.windows)
        place(ACPI_OFFSET, tables, SMBIOS_OFFSET - ACPI_OFFSET, "ACPI tables")
    made = smbios.tables(ROM_ALIAS + SMBIOS_OFFSET, boot.enclave_id)
    place(SMBIOS_OFFSET, made, LOADER_OFFSET - SMBIOS_OFFSET, "SMBIOS structures")
    place(LOADER_OFFSET, code, MAX_LOADER_SIZE, "loader")
    displacement = (LOADER_OFFSET - (RESET_VECTOR_OFFSET + 3)) & 0xFFFF
    place(RESET_VECTOR_OFFSET, b"\xe9" + pack("<H", displacement), 16, "reset vector")
    return bytes(rom)


def _description(boot: Boot, suffix_size: int, entries: Sequence[E820Entry]) -> bytes:
    head = BOOT_DESCRIPTION.pack(
        b"EKBD",
        2,
        PROTOCOLS[boot.protocol],
        boot.image_base,
        boot.image_size,
        low_memory_end(boot.memory),
        boot.rsdp,
        SUFFIX_OFFSET,
        suffix_size,
        boot.entry,
        boot.argument,
        len(entries),
    )
    return head + b"".join(E820.pack(entry.address, entry.size, entry.type) for entry in entries)
