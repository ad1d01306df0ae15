# SPDX-License-Identifier: Apache-2.0
"""ELF files for the tests, made by hand: headers, an interpreter, a dynamic section, and nothing to run."""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack

PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3
BASE = 0x400000
"""Where the file is loaded, so that addresses are no offsets."""


def elf_file(
    *,
    bits: int = 64,
    order: str = "<",
    machine: int = 62,
    kind: int = 2,
    interpreter: bytes | None = None,
    needed: Sequence[bytes] = (),
    rpath: bytes | None = None,
    runpath: bytes | None = None,
) -> bytes:
    """The segments stand after the headers: interpreter, table of strings, dynamic section."""
    tags = [(1, name) for name in needed]
    tags += [(tag, path) for tag, path in ((15, rpath), (29, runpath)) if path is not None]
    word = "Q" if bits == 64 else "I"
    header_size, entry_size = (64, 56) if bits == 64 else (52, 32)
    count = 1 + (interpreter is not None) + bool(tags)
    body = header_size + count * entry_size
    interpreter_data = b"" if interpreter is None else interpreter + b"\0"
    strings, entries = b"\0", []
    for tag, text in tags:
        entries.append((tag, len(strings)))
        strings += text + b"\0"
    strings_offset = body + len(interpreter_data)
    entries += [(5, BASE + strings_offset), (10, len(strings)), (0, 0)]
    dynamic = b"".join(pack(order + word * 2, *entry) for entry in entries) if tags else b""
    size = strings_offset + len(strings) + len(dynamic)
    segments = [(PT_LOAD, 0, BASE, size)]
    if interpreter is not None:
        segments.append((PT_INTERP, body, BASE + body, len(interpreter_data)))
    if tags:
        segments.append((PT_DYNAMIC, strings_offset + len(strings), 0, len(dynamic)))
    ident = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]) + bytes(9)
    fields = (kind, machine, 1, BASE, header_size, 0, 0, header_size, entry_size, count, 0, 0, 0)
    header = ident + pack(f"{order}HHI{word * 3}IHHHHHH", *fields)
    return header + b"".join(_segment(bits, order, *one) for one in segments) + interpreter_data + strings + dynamic


def _segment(bits: int, order: str, kind: int, offset: int, address: int, size: int) -> bytes:
    if bits == 64:
        return pack(f"{order}IIQQQQQQ", kind, 4, offset, address, address, size, size, 1)
    return pack(f"{order}IIIIIIII", kind, offset, address, address, size, size, 4, 1)
