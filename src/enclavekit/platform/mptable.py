# SPDX-License-Identifier: Apache-2.0
"""MP table: CPUs and interrupts for kernels without ACPI, as real enclaves have it.

Source: Intel MultiProcessor Specification 1.4, chapter 4. The floating pointer must lie on 16 bytes in the last KiB of
base memory or in 0xf0000-0xfffff, where Linux looks (linux: arch/x86/kernel/mpparse.c).
"""

from __future__ import annotations

from struct import Struct

from enclavekit.platform.machine import Ioapic

FLOATING_POINTER = Struct(
    "<"  #  little-endian, no padding
    "4s"  # 0x0 signature, "_MP_"
    "I"  #  0x4 physical address of the configuration table
    "B"  #  0x8 length, in 16 bytes
    "B"  #  0x9 specification revision: 4 is 1.4
    "B"  #  0xa checksum: all bytes add up to 0
    "5x"  # 0xb features: 0, a configuration table is present
)
CONFIGURATION_HEADER = Struct(
    "<"
    "4s"  #  0x00 signature, "PCMP"
    "H"  #   0x04 length of header and entries
    "B"  #   0x06 specification revision
    "B"  #   0x07 checksum
    "8s"  #  0x08 OEM
    "12s"  # 0x10 product
    "I"  #   0x1c OEM table, none
    "H"  #   0x20 its size
    "H"  #   0x22 count of entries
    "I"  #   0x24 local APIC address
    "4x"  #  0x28 extended table, none
)
PROCESSOR = Struct(
    "<BBBBII8x"
)  # type 0, local APIC id, its version, flags (1 enabled, 2 boot CPU), signature, features
BUS = Struct("<BB6s")  # type 1, id, name
IOAPIC = Struct("<BBBBI")  # type 2, id, version, flags (1 enabled), address
INTERRUPT = Struct("<BBHBBBB")  # type 3 I/O or 4 local, kind, flags, source bus, source IRQ, destination APIC, its pin

LOCAL_APIC_ADDRESS = 0xFEE0_0000
APIC_VERSION = 0x14
IOAPIC_PINS = 24
INT, NMI, EXTINT = 0, 1, 3
ALL_LOCAL_APICS = 0xFF


def checksum(data: bytes) -> int:
    """The byte that makes the sum of all bytes 0."""
    return -sum(data) & 0xFF


def floating_pointer(table_address: int) -> bytes:
    """16 bytes that lead to the configuration table at ``table_address``."""
    raw = FLOATING_POINTER.pack(b"_MP_", table_address, 1, 4, 0)
    return FLOATING_POINTER.pack(b"_MP_", table_address, 1, 4, checksum(raw))


def configuration_table(cpus: int, ioapic: Ioapic) -> bytes:
    """The table itself: ``cpus`` processors with APIC ids from 0, one ISA bus whose IRQ n is pin n."""
    entries = [PROCESSOR.pack(0, cpu, APIC_VERSION, 3 if cpu == 0 else 1, 0x600, 0x201) for cpu in range(cpus)]
    entries.append(BUS.pack(1, 0, b"ISA   "))
    entries.append(IOAPIC.pack(2, ioapic.id, APIC_VERSION, 1, ioapic.address))
    entries += [INTERRUPT.pack(3, INT, 0, 0, irq, ioapic.id, pin) for irq, pin in isa_pins()]
    entries.append(INTERRUPT.pack(4, EXTINT, 0, 0, 0, 0, 0))
    entries.append(INTERRUPT.pack(4, NMI, 0, 0, 0, ALL_LOCAL_APICS, 1))
    body = b"".join(entries)

    def header(check: int) -> bytes:
        size = CONFIGURATION_HEADER.size + len(body)
        return CONFIGURATION_HEADER.pack(
            b"PCMP", size, 4, check, b"ENCLAVEK", b"ENCLAVE     ", 0, 0, len(entries), LOCAL_APIC_ADDRESS
        )

    return header(checksum(header(0) + body)) + body


def isa_pins() -> list[tuple[int, int]]:
    """(ISA IRQ, I/O APIC pin): the same number, but for the timer's IRQ 0 on pin 2, where the cascade would be."""
    return [(0, 2)] + [(irq, irq) for irq in range(1, IOAPIC_PINS) if irq != 2]
