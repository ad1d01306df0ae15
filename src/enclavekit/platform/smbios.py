# SPDX-License-Identifier: Apache-2.0
"""SMBIOS: who made this machine, and which enclave it is, where guests look (``/sys/class/dmi/id``).

The id is the board's asset tag, where EC2 instances have theirs, and the system's serial number.
Source: DMTF DSP0134 (SMBIOS 3.0), §5.2.2 (64-bit entry point), §7 (structures).
"""

from __future__ import annotations

from struct import Struct, pack

from enclavekit.platform.mptable import checksum

ENTRY_POINT = Struct(
    "<"  #  little-endian, no padding
    "5s"  # 0x00 anchor, "_SM3_"
    "B"  #  0x05 checksum of this structure
    "B"  #  0x06 its length
    "BB"  # 0x07 version, major and minor
    "B"  #  0x09 of the specification's document
    "B"  #  0x0a entry point revision
    "x"  #  0x0b reserved
    "I"  #  0x0c largest size of the structures, bytes
    "Q"  #  0x10 where they are
)
HEADER = Struct(
    "<"
    "B"  # 0x0 type
    "B"  # 0x1 length of the formatted part, this header included
    "H"  # 0x2 handle
)
BIOS, SYSTEM, BOARD, CHASSIS, END = 0, 1, 2, 3, 127
MANUFACTURER, PRODUCT, VERSION = "enclavekit", "Enclave", "1"
CHARACTERISTICS_NOT_SUPPORTED = 1 << 3
VIRTUAL_MACHINE = 1 << 4
"""Of the second byte of the extended characteristics."""
WAKE_UP_POWER_SWITCH = 6
CHASSIS_OTHER, UNKNOWN = 1, 2


def asset_tag(enclave_id: str) -> str:
    """What an enclave's id looks like to its guest."""
    return f"enclave-{enclave_id}"


def entry_point(address: int, size: int) -> bytes:
    """24 bytes, to lie on 16 bytes in 0xf0000-0xfffff, that lead to the structures at ``address``."""

    def raw(check: int) -> bytes:
        return ENTRY_POINT.pack(b"_SM3_", check, ENTRY_POINT.size, 3, 0, 0, 1, size, address)

    return raw(checksum(raw(0)))


def structures(enclave_id: str) -> bytes:
    """BIOS, system, board, chassis, and the end."""
    tag = asset_tag(enclave_id)
    # Firmware: vendor, version, start segment, date, ROM size, characteristics, their extension, releases (none).
    bios = pack(
        "<BBHBBQBBBBBB", 1, 2, 0xF000, 3, 0, CHARACTERISTICS_NOT_SUPPORTED, 0, VIRTUAL_MACHINE, 0xFF, 0xFF, 0xFF, 0xFF
    )
    # Manufacturer, product, version, serial number, UUID (absent), wake-up type, SKU, family.
    system = pack("<BBBB16sBBB", 1, 2, 3, 4, bytes(16), WAKE_UP_POWER_SWITCH, 0, 0)
    # Manufacturer, product, version, serial number, asset tag, features, location, chassis, type, contained (none).
    board = pack("<BBBBBBBHBB", 1, 2, 3, 0, 4, 1, 0, 0x0300, 10, 0)
    # Manufacturer, type, version, serial number, asset tag, four states, OEM, height, cords, contained (none).
    chassis = pack("<BBBBBBBBBIBBBB", 1, CHASSIS_OTHER, 0, 0, 0, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, 0, 0, 0, 0, 0)
    return b"".join(
        (
            _structure(BIOS, 0x0000, bios, MANUFACTURER, VERSION, "01/01/1970"),
            _structure(SYSTEM, 0x0100, system, MANUFACTURER, PRODUCT, VERSION, tag),
            _structure(BOARD, 0x0200, board, MANUFACTURER, PRODUCT, VERSION, tag),
            _structure(CHASSIS, 0x0300, chassis, MANUFACTURER),
            _structure(END, 0x7F00, b""),
        )
    )


def tables(base: int, enclave_id: str) -> bytes:
    """Entry point and structures as they lie from the physical address ``base``."""
    made = structures(enclave_id)
    return entry_point(base + 32, len(made)).ljust(32, b"\0") + made


def _structure(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    """Header, formatted part, and the strings that it numbers from 1."""
    text = b"".join(string.encode("ascii") + b"\0" for string in strings) or b"\0"
    return HEADER.pack(kind, HEADER.size + len(body), handle) + body + text + b"\0"
