# SPDX-License-Identifier: Apache-2.0
"""PVH: an unpacked kernel is entered at the address in its ELF note, with a small structure that says all.

Source: xen docs/misc/pvh.pandoc, include/public/arch-x86/hvm/start_info.h, include/public/elfnote.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from struct import Struct, unpack_from

from enclavekit.errors import KernelError
from enclavekit.platform.guest_memory import GuestMemory
from enclavekit.platform.machine import E820Entry

START_INFO = Struct(
    "<"  #  little-endian, no padding
    "I"  # 0x00 magic
    "I"  # 0x04 version
    "I"  # 0x08 flags
    "I"  # 0x0c count of modules
    "Q"  # 0x10 the modules
    "Q"  # 0x18 command line, ends with a NUL
    "Q"  # 0x20 ACPI RSDP
    "Q"  # 0x28 memory map
    "I"  # 0x30 count of its entries
    "4x"
)
MODULE = Struct(
    "<"
    "Q"  # 0x00 physical address
    "Q"  # 0x08 size in bytes
    "16x"  #    its command line, reserved
)
MEMORY_MAP_ENTRY = Struct(
    "<"
    "Q"  # 0x00 physical address
    "Q"  # 0x08 size in bytes
    "I"  # 0x10 type, as in E820
    "4x"
)
MAGIC = 0x336EC578

PT_LOAD, PT_NOTE = 1, 4
NOTE_PHYS32_ENTRY = 18
ELF_HEADER = Struct(
    "<16sHH"  # e_ident, e_type, e_machine
    "12x"
    "Q"  # 0x20 e_phoff
    "14x"
    "H"  # 0x36 e_phentsize
    "H"  # 0x38 e_phnum
)
PROGRAM_HEADER = Struct(
    "<"
    "I"  # 0x00 p_type
    "4x"
    "Q"  # 0x08 p_offset
    "8x"
    "Q"  # 0x18 p_paddr
    "Q"  # 0x20 p_filesz
    "Q"  # 0x28 p_memsz
    "8x"
)
ELF64_LITTLE = b"\x7fELF\x02\x01"
X86_64 = 62
HEAD_SIZE = 0x10000
MAX_NOTES_SIZE = 0x10000


def start_info(
    address: int, *, initrd: tuple[int, int], cmdline: int, rsdp: int, entries: Sequence[E820Entry]
) -> bytes:
    """hvm_start_info for ``address``, with the module and the memory map that it points at behind it."""
    modules = address + START_INFO.size
    memory_map = modules + MODULE.size
    count = 1 if initrd[1] else 0
    head = START_INFO.pack(MAGIC, 1, 0, count, modules, cmdline, rsdp, memory_map, len(entries))
    body = b"".join(MEMORY_MAP_ENTRY.pack(entry.address, entry.size, entry.type) for entry in entries)
    return head + MODULE.pack(*initrd) + body


def load_vmlinux(memory: GuestMemory, chunks: Iterable[bytes], start: int, end: int) -> int:
    """Write the segments of an unpacked kernel, all within [start, end), and return its PVH entry.

    Errors: ``KernelError`` for what is no such kernel.
    """
    stream = iter(chunks)
    head = b""
    while len(head) < HEAD_SIZE and (chunk := next(stream, b"")):
        head += chunk
    loads, notes = _segments(head, start, end)
    collected = {segment: bytearray() for segment in notes}
    entry: int | None = None
    position = 0
    for chunk in _rejoined(head, stream):
        for offset, address, size in loads:
            first, last = max(offset, position), min(offset + size, position + len(chunk))
            if first < last:
                memory.write(address + first - offset, chunk[first - position : last - position])
        for (offset, size), data in collected.items():
            first, last = max(offset, position), min(offset + size, position + len(chunk))
            if first < last:
                data.extend(chunk[first - position : last - position])
        position += len(chunk)
    if any(offset + size > position for offset, _, size in loads):
        raise KernelError(f"vmlinux: ends at 0x{position:x}, before its last segment does")
    for data in collected.values():
        entry = entry if entry is not None else _phys32_entry(bytes(data))
    if entry is None:
        raise KernelError(
            "vmlinux: no PVH entry (ELF note 18 of Xen)", hint="this kernel was built without CONFIG_PVH: --boot linux"
        )
    if not start <= entry < end:
        raise KernelError(f"vmlinux: PVH entry 0x{entry:x}, expected one from 0x{start:x} to 0x{end:x}")
    return entry


def _rejoined(head: bytes, stream: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from stream


def _segments(head: bytes, start: int, end: int) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """(offset, address, size) of what is loaded; (offset, size) of notes."""
    if len(head) < ELF_HEADER.size or not head.startswith(ELF64_LITTLE):
        raise KernelError(f"vmlinux: begins with {head[:6].hex()}, expected a 64-bit ELF file")
    _, _, machine, offset, entry_size, count = ELF_HEADER.unpack_from(head)
    if machine != X86_64 or entry_size != PROGRAM_HEADER.size or offset + count * entry_size > len(head):
        raise KernelError(f"vmlinux: machine {machine}, {count} program headers of {entry_size} bytes at 0x{offset:x}")
    loads, notes = [], []
    for number in range(count):
        kind, where, address, size, room = PROGRAM_HEADER.unpack_from(head, offset + number * entry_size)
        if kind == PT_LOAD and room:
            if size > room or address < start or address + room > end:
                raise KernelError(
                    f"vmlinux: segment of 0x{room:x} bytes at 0x{address:x}, expected 0x{start:x} to 0x{end:x}"
                )
            loads.append((where, address, size))
        elif kind == PT_NOTE:
            if size > MAX_NOTES_SIZE:
                raise KernelError(f"vmlinux: notes of 0x{size:x} bytes, expected at most 0x{MAX_NOTES_SIZE:x}")
            notes.append((where, size))
    return loads, notes


def _phys32_entry(notes: bytes) -> int | None:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = unpack_from("<III", notes, at)
        data = at + 12 + (name_size + 3 & ~3)
        if data + size > len(notes):
            return None
        if notes[at + 12 : at + 12 + name_size] == b"Xen\0" and kind == NOTE_PHYS32_ENTRY and size in (4, 8):
            return int.from_bytes(notes[data : data + size], "little")
        at = data + (size + 3 & ~3)
    return None
