# SPDX-License-Identifier: Apache-2.0
"""A map of guest memory at the moment of the jump into the kernel: what lies where, and why, for each boot protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from enclavekit.codec.bzimage import BzImage
from enclavekit.eif import Image
from enclavekit.eif.layout import SECTION_HEADER_SIZE
from enclavekit.platform.machine import (
    CMDLINE,
    CMDLINE_LIMIT,
    EBDA_START,
    HIGH_MEMORY_START,
    IMAGE_LOAD_OFFSET,
    LOW_MEMORY_LIMIT,
    START_INFO,
    ZERO_PAGE,
    BootProtocol,
    low_memory_end,
)
from enclavekit.platform.placement import image_address, load_address
from enclavekit.platform.rom import ROM_ALIAS, ROM_SIZE

PAGE = 4096
RESTART_MARKER = 0x4F0
LOADER_STACK, LOADER_STACK_END = 0x8000, 0x9000
"""guest/loader/loader.h has these three, too."""
RESET_VECTOR_ROM = (1 << 32) - ROM_SIZE


@dataclass(frozen=True, slots=True)
class Range:
    """Guest physical addresses from ``start`` to ``end``, exclusive."""

    name: str
    start: int
    end: int


def guest_map(protocol: BootProtocol, kernel: BzImage, image: Image, memory: int) -> tuple[Range, ...]:
    """For ``image`` in a machine of ``memory`` bytes; in the order of addresses, ramdisks inside of the image."""
    if protocol is BootProtocol.EIF:
        base, start = IMAGE_LOAD_OFFSET, load_address(kernel, IMAGE_LOAD_OFFSET + image.size)
    else:
        base, start = image_address(kernel), kernel.pref_address
    ramdisks = joined([(base + section.offset, section.size) for section in image.ramdisks])
    found = [
        Range("restart marker", RESTART_MARKER, RESTART_MARKER + 4),
        Range("command line", CMDLINE, CMDLINE + CMDLINE_LIMIT),
        Range("base memory ends", EBDA_START, EBDA_START),
        Range("ROM: boot description, tables, loader", ROM_ALIAS, ROM_ALIAS + ROM_SIZE),
        Range("image", base, base + image.size),
        Range("ramdisks", ramdisks[0], sum(ramdisks)),
        Range("kernel and the room to unpack itself", start, start + kernel.init_size),
        Range("RAM below 4 GiB ends", low_memory_end(memory), low_memory_end(memory)),
        Range("ROM, with the reset vector", RESET_VECTOR_ROM, 1 << 32),
        *_of_protocol(protocol, kernel),
    ]
    if memory > LOW_MEMORY_LIMIT:
        found.append(Range("more RAM", HIGH_MEMORY_START, HIGH_MEMORY_START + memory - LOW_MEMORY_LIMIT))
    return tuple(sorted(found, key=lambda one: (one.start, -one.end)))


def joined(ramdisks: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(address, size) of the one range that they become, from a page on; headers between neighbours stay, as zeros."""
    start = ramdisks[0][0] // PAGE * PAGE
    end = start + ramdisks[0][1]
    for address, size in ramdisks[1:]:
        end += size + (SECTION_HEADER_SIZE if address == end + SECTION_HEADER_SIZE else 0)
    return start, end - start


def _of_protocol(protocol: BootProtocol, kernel: BzImage) -> list[Range]:
    if protocol is BootProtocol.REALMODE:
        return [
            Range("interrupt vectors", 0, 0x400),
            Range("the kernel's real-mode part", ZERO_PAGE, ZERO_PAGE + kernel.protected_mode_offset),
        ]
    stack = Range("the loader's stack", LOADER_STACK, LOADER_STACK_END)
    if protocol is BootProtocol.PVH:
        return [stack, Range("start info, module, memory map", START_INFO, START_INFO + PAGE)]
    return [stack, Range("zero page", ZERO_PAGE, ZERO_PAGE + PAGE)]
