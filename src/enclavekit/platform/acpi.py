# SPDX-License-Identifier: Apache-2.0
"""ACPI tables for kernels that find virtio-mmio devices in no other way, Debian's among them.

Hardware-reduced ACPI: no SCI, no PM timer, no fixed hardware at all. RSDP → XSDT → FADT (→ DSDT), MADT.
Source: ACPI Specification 6.5, chapters 5 (tables) and 20 (AML); virtio 1.2 §4.2 gives LNRO0005 no mention, the id is
Linux's (linux: drivers/virtio/virtio_mmio.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct, pack

from enclavekit.platform.machine import Ioapic, VirtioWindow
from enclavekit.platform.mptable import LOCAL_APIC_ADDRESS, checksum

OEM_ID = b"ENCLKT"
OEM_TABLE_ID = b"ENCLAVE "

RSDP = Struct(
    "<"  #  little-endian, no padding
    "8s"  # 0x00 signature, "RSD PTR "
    "B"  #  0x08 checksum of the first 20 bytes
    "6s"  # 0x09 OEM id
    "B"  #  0x0f revision 2
    "I"  #  0x10 RSDT, none
    "I"  #  0x14 length of this structure
    "Q"  #  0x18 XSDT
    "B"  #  0x20 checksum of all 36 bytes
    "3x"  # 0x21 reserved
)
SDT_HEADER = Struct(
    "<"
    "4s"  # 0x00 signature
    "I"  #  0x04 length of the whole table
    "B"  #  0x08 revision
    "B"  #  0x09 checksum of the whole table
    "6s"  # 0x0a OEM id
    "8s"  # 0x10 OEM table id
    "I"  #  0x18 OEM revision
    "4s"  # 0x1c creator id
    "I"  #  0x20 creator revision
)

FADT_SIZE = 276
FADT_BOOT_ARCH = 109
"""u16: bit 1 an 8042 is present, bit 2 no VGA."""
FADT_FLAGS = 112
"""u32: bit 4 no power button, bit 5 no sleep button, bit 10 a reset register, bit 20 hardware-reduced."""
FADT_RESET_REGISTER = 116
FADT_RESET_VALUE = 128
FADT_MINOR = 131
FADT_X_DSDT = 140
FADT_SLEEP_CONTROL, FADT_SLEEP_STATUS = 244, 256
FADT_HYPERVISOR = 268

I8042_COMMAND, I8042_RESET = 0x64, 0xFE
SLEEP_CONTROL, SLEEP_STATUS = 0x600, 0x601
"""Ports. The kernel wants both before it believes in S5; the machine is off before it writes there: see ``_PTS``."""

EDGE_ACTIVE_HIGH_CONSUMER = 0x03
COM1_PORT, COM1_IRQ = 0x3F8, 4


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """One system description table: header, body, checksum."""

    def header(check: int) -> bytes:
        length = SDT_HEADER.size + len(body)
        return SDT_HEADER.pack(signature, length, revision, check, OEM_ID, OEM_TABLE_ID, 1, b"ENCL", 1)

    return header(checksum(header(0) + body)) + body


def rsdp(xsdt_address: int) -> bytes:
    """36 bytes, to lie on 16 bytes in 0xe0000-0xfffff, or named by the zero page."""

    def raw(first: int, all_: int) -> bytes:
        return RSDP.pack(b"RSD PTR ", first, OEM_ID, 2, 0, RSDP.size, xsdt_address, all_)

    first = checksum(raw(0, 0)[:20])
    return raw(first, checksum(raw(first, 0)))


def fadt(dsdt_address: int) -> bytes:
    """Fixed ACPI description: nothing fixed is there, but an 8042 for the reset."""
    body = bytearray(FADT_SIZE)
    body[FADT_BOOT_ARCH : FADT_BOOT_ARCH + 2] = pack("<H", 1 << 1 | 1 << 2)
    body[FADT_FLAGS : FADT_FLAGS + 4] = pack("<I", 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20)
    body[FADT_RESET_REGISTER : FADT_RESET_REGISTER + 12] = _register(I8042_COMMAND)
    body[FADT_RESET_VALUE] = I8042_RESET
    body[FADT_SLEEP_CONTROL : FADT_SLEEP_CONTROL + 12] = _register(SLEEP_CONTROL)
    body[FADT_SLEEP_STATUS : FADT_SLEEP_STATUS + 12] = _register(SLEEP_STATUS)
    body[FADT_MINOR] = 5
    body[FADT_X_DSDT : FADT_X_DSDT + 8] = pack("<Q", dsdt_address)
    body[FADT_HYPERVISOR : FADT_HYPERVISOR + 8] = b"ENCLAVEK"
    return table(b"FACP", 6, bytes(body[SDT_HEADER.size :]))


def madt(cpus: int, ioapic: Ioapic) -> bytes:
    """Interrupt controllers: a local APIC for each CPU, one I/O APIC, the timer's IRQ 0 on pin 2."""
    pcat_compat = 1  # two 8259s are there as well
    entries = [pack("<BBBBI", 0, 8, cpu, cpu, 1) for cpu in range(cpus)]
    entries.append(pack("<BBBxII", 1, 12, ioapic.id, ioapic.address, 0))
    entries.append(pack("<BBBBIH", 2, 10, 0, 0, 2, 0))
    return table(b"APIC", 5, pack("<II", LOCAL_APIC_ADDRESS, pcat_compat) + b"".join(entries))


def dsdt(windows: Sequence[VirtioWindow]) -> bytes:
    """The devices: COM1, without which user space's output to ttyS0 is lost, and each virtio-mmio window."""
    devices = [_device(b"COM1", _name(b"_HID", _eisa_id("PNP0501")) + _name(b"_CRS", _resources(_com1())))]
    for number, window in enumerate(windows):
        body = (
            _name(b"_HID", b"\x0dLNRO0005\x00")
            + _name(b"_UID", b"\x0a" + bytes([number]))
            + _name(b"_CCA", b"\x01")
            + _name(b"_CRS", _resources(_memory(window) + _interrupt(window.irq)))
        )
        devices.append(_device(b"V%03d" % number, body))
    return table(b"DSDT", 2, _power_off() + b"\x10" + _package(b"_SB_" + b"".join(devices)))


def xsdt(addresses: Sequence[int]) -> bytes:
    """The list of the other tables."""
    return table(b"XSDT", 1, b"".join(pack("<Q", address) for address in addresses))


def tables(base: int, cpus: int, ioapic: Ioapic, windows: Sequence[VirtioWindow]) -> bytes:
    """All tables as they lie from the physical address ``base``, the RSDP first."""
    made = bytearray(RSDP.size)

    def place(data: bytes) -> int:
        made.extend(bytes(-len(made) % 16))
        made.extend(data)
        return base + len(made) - len(data)

    dsdt_address = place(dsdt(windows))
    xsdt_address = place(xsdt([place(fadt(dsdt_address)), place(madt(cpus, ioapic))]))
    made[: RSDP.size] = rsdp(xsdt_address)
    return bytes(made)


# AML, as little of it as the devices need (ACPI 6.5 §20.2).


def _package(body: bytes) -> bytes:
    """PkgLength, which counts itself, and the body."""
    if len(body) + 1 < 1 << 6:
        return bytes([len(body) + 1]) + body
    length = len(body) + 2
    if length < 1 << 12:
        return bytes([0x40 | length & 0xF, length >> 4]) + body
    length = len(body) + 3
    return bytes([0x80 | length & 0xF, length >> 4 & 0xFF, length >> 12]) + body


def _device(name: bytes, body: bytes) -> bytes:
    return b"\x5b\x82" + _package(name + body)


def _register(port: int) -> bytes:
    """Generic address structure of a byte-wide I/O port (ACPI 6.5 §5.2.3.2)."""
    return pack("<BBBBQ", 1, 8, 0, 1, port)


def _power_off() -> bytes:
    """``_S5`` exists; ``_PTS``, which is called on the way there, ends the machine as a reset does."""
    state = b"\x12" + _package(b"\x01\x0a\x05")
    region = b"\x5b\x80I042\x01\x0a" + bytes([I8042_COMMAND]) + b"\x01"  # OperationRegion (I042, SystemIO, 0x64, One)
    field = b"\x5b\x81" + _package(b"I042\x01CMD_\x08")  # Field (I042, ByteAcc, NoLock, Preserve) { CMD_, 8 }
    store = b"\x70\x0a" + bytes([I8042_RESET]) + b"CMD_"
    condition = b"\xa0" + _package(b"\x93\x68\x0a\x05" + store)  # If (Arg0 == 5)
    return _name(b"_S5_", state) + region + field + b"\x14" + _package(b"_PTS\x01" + condition)


def _name(name: bytes, value: bytes) -> bytes:
    return b"\x08" + name + value


def _eisa_id(text: str) -> bytes:
    """DWordConst of a compressed id: three letters of five bits, four hex digits."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    vendor = letters[0] << 10 | letters[1] << 5 | letters[2]
    return b"\x0c" + pack(">HH", vendor, int(text[3:], 16))


def _resources(descriptors: bytes) -> bytes:
    """Buffer of resource descriptors with its end tag."""
    data = descriptors + b"\x79\x00"
    return b"\x11" + _package(b"\x0a" + bytes([len(data)]) + data)


def _memory(window: VirtioWindow) -> bytes:
    """32-bit fixed memory range, writable."""
    return pack("<BHBII", 0x86, 9, 1, window.address, window.size)


def _interrupt(gsi: int) -> bytes:
    """Extended interrupt."""
    return pack("<BHBBI", 0x89, 6, EDGE_ACTIVE_HIGH_CONSUMER, 1, gsi)


def _com1() -> bytes:
    """I/O port range and ISA IRQ of the first serial port."""
    return pack("<BBHHBB", 0x47, 1, COM1_PORT, COM1_PORT, 1, 8) + pack("<BH", 0x22, 1 << COM1_IRQ)
