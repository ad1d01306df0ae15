# SPDX-License-Identifier: Apache-2.0
"""PVH: start info as its layout says, and kernels that are whole, damaged, or made to be written elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from struct import pack, unpack_from

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.errors import Error, KernelError
from enclavekit.platform.guest_memory import GuestMemory
from enclavekit.platform.machine import MIB, memory_map
from enclavekit.platform.pvh import load_vmlinux, start_info

START, END = MIB, 2 * MIB
CODE = bytes(range(1, 251)) * 4


class Region:
    def __init__(self, offset: int, size: int) -> None:
        self.offset, self.buffer = offset, memoryview(bytearray(size))


def memory() -> GuestMemory:
    """4 MiB in two regions, whose border lies in the first segment."""
    return GuestMemory([Region(0, START + 100), Region(START + 100, 3 * MIB - 100)], 4 * MIB)


def note(kind: int = 18, value: bytes = pack("<I", START + 16)) -> bytes:
    return pack("<III4s", 4, len(value), kind, b"Xen\0") + value + bytes(-len(value) % 4)


def vmlinux(address: int = START, room: int = 4096, notes: bytes | None = None, machine: int = 62) -> bytes:
    notes = pack("<III8s4s", 5, 4, 1, b"Other", b"data") + note() if notes is None else notes
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + pack(
        "<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    where = 64 + 2 * 56
    load = pack("<IIQQQQQQ", 1, 5, where, 0, address, len(CODE), room, 4096)
    noted = pack("<IIQQQQQQ", 4, 4, where + len(CODE), 0, 0, len(notes), len(notes), 4)
    return header + load + noted + CODE + notes


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 1 << 20])
def test_segments_and_entry(size: int) -> None:
    loaded = memory()
    assert load_vmlinux(loaded, pieces(vmlinux(), size), START, END) == START + 16
    assert loaded.read(START, len(CODE)) == CODE
    assert loaded.read(START + len(CODE), 100) == bytes(100)
    assert loaded.read(START - 100, 100) == bytes(100)


REFUSED = {
    "no ELF": (b"MZ" + bytes(100), "vmlinux: begins with 4d5a00000000, expected a 64-bit ELF file"),
    "another machine": (vmlinux(machine=183), "vmlinux: machine 183, 2 program headers of 56 bytes at 0x40"),
    "below": (vmlinux(START - 1), "vmlinux: segment of 0x1000 bytes at 0xfffff, expected 0x100000 to 0x200000"),
    "above": (vmlinux(END - 5), "vmlinux: segment of 0x1000 bytes at 0x1ffffb, expected 0x100000 to 0x200000"),
    "larger than its room": (
        vmlinux(room=10),
        "vmlinux: segment of 0xa bytes at 0x100000, expected 0x100000 to 0x200000",
    ),
    "cut": (vmlinux()[:500], "vmlinux: ends at 0x1f4, before its last segment does"),
    "no note": (vmlinux(notes=b""), "vmlinux: no PVH entry (ELF note 18 of Xen)"),
    "another note": (vmlinux(notes=note(kind=6)), "vmlinux: no PVH entry (ELF note 18 of Xen)"),
    "a note cut": (vmlinux(notes=note()[:-2]), "vmlinux: no PVH entry (ELF note 18 of Xen)"),
    "entry outside": (
        vmlinux(notes=note(value=pack("<Q", 1 << 40))),
        "vmlinux: PVH entry 0x10000000000, expected one from 0x100000 to 0x200000",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(KernelError) as caught:
        load_vmlinux(memory(), pieces(data, 4096), START, END)
    assert str(caught.value) == words


@given(st.integers(0, len(vmlinux()) - 1), st.binary(min_size=1, max_size=16))
def test_nothing_outside_is_written(at: int, change: bytes) -> None:
    data = bytearray(vmlinux())
    data[at : at + len(change)] = change
    loaded = memory()
    with contextlib.suppress(Error):
        load_vmlinux(loaded, pieces(bytes(data), 512), START, END)
    assert not loaded.read(0, START).strip(b"\0")
    assert not loaded.read(END, 2 * MIB).strip(b"\0")


def test_start_info() -> None:
    entries = memory_map(64 * MIB)
    raw = start_info(0x6000, initrd=(0x200000, 77), cmdline=0x20000, rsdp=0xF3000, entries=entries)
    assert unpack_from("<IIIIQQQQI", raw) == (0x336EC578, 1, 0, 1, 0x6038, 0x20000, 0xF3000, 0x6058, len(entries))
    assert unpack_from("<QQ", raw, 0x38) == (0x200000, 77)
    assert unpack_from("<QQI", raw, 0x58) == (0, 0x9FC00, 1)


def test_nothing_is_written_past_memory() -> None:
    with pytest.raises(Error, match=r"^memory: 0x2 bytes at 0x3fffff, have 0x400000$"):
        memory().write(4 * MIB - 1, b"xx")
