# SPDX-License-Identifier: Apache-2.0
"""The loader in the ROM, alone: images that the host's reader would refuse are put into memory all the same."""

from __future__ import annotations

import io
import os
import select
import zlib
from pathlib import Path
from struct import pack_into

import pytest

from enclavekit.eif import Discovery
from enclavekit.environment import data_directory
from enclavekit.hypervisor.accel import Accel
from enclavekit.hypervisor.contract import Enclave, ImageKind, LaunchSpec, Mode
from enclavekit.hypervisor.launch import launch, write_image
from enclavekit.hypervisor.qemu import QemuCarrier
from enclavekit.runtime import find_qemu

MIB = 1 << 20
HEADER = 548
SECTIONS = ((1, 0x800), (2, 40), (5, 10), (3, 512), (3, 512))


def image() -> bytearray:
    """An EIF with a kernel that is only a setup header."""
    kernel = bytearray(0x800)
    pack_into("<H", kernel, 0x1FE, 0xAA55)
    kernel[0x202:0x206] = b"HdrS"
    pack_into("<H", kernel, 0x206, 0x20F)
    kernel[0x1F1] = 1
    kernel[0x211] = 1
    kernel[0x234] = 1
    pack_into("<I", kernel, 0x230, 0x200000)
    pack_into("<I", kernel, 0x22C, 0x7FFFFFFF)
    pack_into("<I", kernel, 0x238, 2047)
    data = bytearray(HEADER)
    pack_into(">4sHHQQHH", data, 0, b".eif", 4, 0, 1 << 30, 2, 0, len(SECTIONS))
    for number, (kind, size) in enumerate(SECTIONS):
        pack_into(">Q", data, 0x1C + 8 * number, len(data))
        pack_into(">Q", data, 0x11C + 8 * number, size)
        header = bytearray(12)
        pack_into(">HHQ", header, 0, kind, 0, size)
        data += header + (kernel if kind == 1 else bytes(size))
    return data


def sealed(data: bytearray) -> bytearray:
    """With the CRC that the host checks."""
    data = data.ljust(HEADER, b"\0")
    pack_into(">I", data, 544, zlib.crc32(data[HEADER:], zlib.crc32(data[:544])))
    return data


def console_of(enclave: Enclave) -> str:
    """All that the serial line said until the machine stopped."""
    poller = select.poll()
    poller.register(enclave.fileno(), select.POLLHUP)
    assert poller.poll(30_000), "the machine runs on"
    assert enclave.failure() is None
    console = enclave.console()
    assert console is not None
    return os.read(console, 4096).decode()


def boot(data: bytearray, tmp_path: Path, memory: int = 64 * MIB) -> str:
    """What the loader says before it stops the machine."""
    data = sealed(data)
    qemu = find_qemu(data_directory() / "runtime")
    carrier = QemuCarrier(qemu.command, qemu.environment, qemu.version, Accel.TCG)
    spec = LaunchSpec("00000000", memory, 1, len(data), Discovery.CMDLINE, tmp_path)
    enclave = launch(carrier.create, spec, io.BytesIO(data), mode=Mode.DEBUG)
    try:
        return console_of(enclave)
    finally:
        enclave.close()


def ramdisk_before_the_kernel() -> bytearray:
    """The table names the kernel first, but the first ramdisk lies before it in the file."""
    data = image()
    end = len(data)
    data += data[HEADER : HEADER + 12 + 0x800]  # the kernel once more, at the end
    pack_into(">Q", data, 0x1C, end)
    pack_into(">HHQ", data, HEADER, 5, 0, 0x800)
    return data


def changed(offset: int, value: bytes) -> bytearray:
    data = image()
    data[offset : offset + len(value)] = value
    return data


KERNEL = HEADER + 12
CASES = {
    "magic": (changed(0, b"xxxx"), "image magic: got 0x78787878, expected 0x2e656966"),
    "version": (changed(4, b"\0\x05"), "image version: got 0x00000005, expected 2, 3 or 4"),
    "aarch64": (changed(6, b"\0\x01"), "image flags: got 0x00000001, expected bit 0 clear, for x86_64"),
    "no sections": (changed(0x1A, b"\0\0"), "section count: got 0x00000000, expected 2 to 32"),
    "many sections": (changed(0x1A, b"\0\x21"), "section count: got 0x00000021, expected 2 to 32"),
    "offset in the header": (
        changed(0x1C, (8).to_bytes(8, "big")),
        "section offset: got 0x00000008, expected a place inside the image",
    ),
    "offset past the end": (
        changed(0x1C, (1 << 40).to_bytes(8, "big")),
        "section offset: got 0x0000010000000000, expected a place inside the image",
    ),
    "offset that wraps": (
        changed(0x1C, b"\xff" * 8),
        "section offset: got 0xffffffffffffffff, expected a place inside the image",
    ),
    "size past the end": (
        changed(0x11C, b"\xff" * 8),
        "section size: got 0xffffffffffffffff, expected no more than the image holds",
    ),
    "overlap": (
        changed(0x1C + 8, HEADER.to_bytes(8, "big")),
        "section offset: got 0x00000224, expected a place behind the section before",
    ),
    "table and header": (
        changed(HEADER + 4, (1).to_bytes(8, "big")),
        "section header size: got 0x00000001, expected the size in the table",
    ),
    "type": (changed(HEADER, b"\0\x09"), "section type: got 0x00000009, expected 1 to 5"),
    "no kernel": (changed(HEADER, b"\0\x03"), "ramdisk before the kernel at offset"),
    "no bzImage": (changed(KERNEL + 0x202, b"xxxx"), "kernel magic: got 0x78787878, expected 0x53726448 of a bzImage"),
    "old protocol": (
        changed(KERNEL + 0x206, b"\x00\x02"),
        "kernel boot protocol: got 0x00000200, expected 0x20c or newer",
    ),
    "only a real-mode part": (
        changed(KERNEL + 0x1F1, b"\xff"),
        "kernel size: got 0x00000800, expected more than its real-mode part",
    ),
    "alignment": (
        changed(KERNEL + 0x230, (3).to_bytes(4, "little")),
        "kernel alignment: got 0x00000003, expected a power of two",
    ),
    "no room": (
        changed(KERNEL + 0x260, b"\xff\xff\xff\x7f"),
        "memory end: got 0x04000000, expected room for the kernel past the image",
    ),
    "preferred address that wraps": (
        changed(KERNEL + 0x258, b"\xff" * 8),
        "kernel preferred address: got 0xffffffffffffffff, expected a place in memory below 4 GiB",
    ),
    "ramdisk before the kernel": (
        ramdisk_before_the_kernel(),
        "section offset: got 0x00000a30, expected a place behind the section before",
    ),
    "command line": (
        changed(KERNEL + 0x238, (10).to_bytes(4, "little")),
        "command line size: got",
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_wrong_is_said_and_the_machine_stops(case: str, tmp_path: Path) -> None:
    data, words = CASES[case]
    assert f"loader: {words}" in boot(bytearray(data), tmp_path)


def test_an_image_that_is_only_a_magic(tmp_path: Path) -> None:
    assert "loader: section count: got 0x00000000" in boot(bytearray(b".eif\0\x04"), tmp_path)


def test_a_kernel_that_jumped_back_is_not_booted_again(tmp_path: Path) -> None:
    """Page 0 still holds what the loader wrote there the first time."""
    data = sealed(image())
    qemu = find_qemu(data_directory() / "runtime")
    enclave = QemuCarrier(qemu.command, qemu.environment, qemu.version, Accel.TCG).create(
        LaunchSpec("00000000", 64 * MIB, 1, len(data), Discovery.CMDLINE, tmp_path)
    )
    try:
        (region,) = enclave.allocate(64 * MIB)
        write_image(io.BytesIO(data), len(data), [region], enclave.image_load_offset(ImageKind.EIF))
        region.buffer[0x4F0:0x4F4] = b"EKBD"
        enclave.set_user_memory_region(region)
        enclave.add_vcpu()
        enclave.start(mode=Mode.DEBUG)
        assert console_of(enclave) == "loader: the kernel restarted the machine\r\n"
    finally:
        enclave.close()
