# SPDX-License-Identifier: Apache-2.0
"""The zero page (struct boot_params, 4096 bytes), and the setup header in it, as a boot loader fills them in.

Source: linux Documentation/arch/x86/boot.rst, zero-page.rst. The loader in the ROM does the same for an EIF.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct, pack_into

from enclavekit.codec.bzimage import HEADER_OFFSET
from enclavekit.platform.machine import E820Entry

SIZE = 4096
JUMP_OFFSET = 0x201
"""u8: the header ends at 0x202 plus this."""
HEADER_MAGIC = 0x202

VID_MODE = 0x1FA
TYPE_OF_LOADER = 0x210
LOADFLAGS = 0x211
CODE32_START = 0x214
RAMDISK_IMAGE = 0x218
RAMDISK_SIZE = 0x21C
HEAP_END_PTR = 0x224
CMD_LINE_PTR = 0x228
ACPI_RSDP = 0x070
E820_COUNT = 0x1E8
E820_TABLE = 0x2D0

LOADER_UNKNOWN = 0xFF
CAN_USE_HEAP = 0x80
VIDEO_NORMAL = 0xFFFF
VIDEO_CURRENT_MODE = 0x0F04
"""Do not touch the mode: there is no screen."""

E820 = Struct(
    "<"
    "Q"  # 0x0 address
    "Q"  # 0x8 size in bytes
    "I"  # 0x10 type
)


def fill_header(page: bytearray, *, kernel: int, initrd: tuple[int, int], cmdline: int, vid_mode: int) -> None:
    """A setup header's fields that are a loader's to write; ``initrd`` is (address, size)."""
    pack_into("<H", page, VID_MODE, vid_mode)
    page[TYPE_OF_LOADER] = LOADER_UNKNOWN
    pack_into("<I", page, CODE32_START, kernel)
    pack_into("<II", page, RAMDISK_IMAGE, *initrd)
    pack_into("<I", page, CMD_LINE_PTR, cmdline)


def zero_page(
    setup: bytes, *, kernel: int, initrd: tuple[int, int], cmdline: int, rsdp: int, entries: Sequence[E820Entry]
) -> bytes:
    """For a kernel whose file begins with ``setup``; addresses are physical, ``rsdp`` 0 for none."""
    page = bytearray(SIZE)
    end = HEADER_MAGIC + setup[JUMP_OFFSET]
    page[HEADER_OFFSET:end] = setup[HEADER_OFFSET:end]
    fill_header(page, kernel=kernel, initrd=initrd, cmdline=cmdline, vid_mode=VIDEO_NORMAL)
    pack_into("<Q", page, ACPI_RSDP, rsdp)
    page[E820_COUNT] = len(entries)
    for number, entry in enumerate(entries):
        E820.pack_into(page, E820_TABLE + number * E820.size, entry.address, entry.size, entry.type)
    return bytes(page)
