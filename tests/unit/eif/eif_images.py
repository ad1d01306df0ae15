# SPDX-License-Identifier: Apache-2.0
"""Images for the tests: the parts of known images, whose digests were found without this code."""

from __future__ import annotations

import io
import json
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from enclavekit.codec import cpio
from enclavekit.eif import Arch, BytesContent, Section, SectionType, write

KERNEL = b"KERNEL-IMAGE-" + bytes(range(19))
CMDLINE = b"reboot=k panic=30 pci=off nomodules console=ttyS0 random.trust_cpu=on root=/dev/ram0"
METADATA = json.dumps(
    {
        "ImageName": "hello",
        "ImageVersion": "v1",
        "BuildMetadata": {
            "BuildTime": "1970-01-01T00:00:00+00:00",
            "BuildTool": "nitro-cli",
            "BuildToolVersion": "1.5.0",
            "OperatingSystem": "Linux",
            "KernelVersion": "4.14.256",
        },
        "DockerInfo": None,
        "CustomMetadata": None,
    },
    separators=(",", ":"),
).encode()

LINUXKIT_TIME = 1492533000
DIRECTORY = stat.S_IFDIR | 0o755


def linuxkit_archive(files: Sequence[tuple[bytes, int, int, bytes]]) -> bytes:
    """Name, mode, mtime, data: with the inode and device numbers of linuxkit, and its numbered trailer."""
    made = b""
    for ino, (name, mode, mtime, data) in enumerate([*files, (b"TRAILER!!!", 0, 0, b"")], 721):
        nlink = 2 if stat.S_ISDIR(mode) else 1
        made += bytes(cpio.Entry(name, mode, len(data), ino, nlink=nlink, mtime=mtime, dev=(3, 1)))
        made += data + bytes(-len(data) % 4)
    return made + bytes(-len(made) % 512)


def _application() -> Iterator[tuple[bytes, int, int, bytes]]:
    made = 1700000000
    yield b"rootfs", DIRECTORY, LINUXKIT_TIME, b""
    yield b"rootfs/bin/", DIRECTORY, made, b""
    yield b"rootfs/bin/hello.sh", stat.S_IFREG | 0o755, made, b"#!/bin/sh\necho hello\n"
    yield b"rootfs/bin/hi", stat.S_IFLNK | 0o777, made, b"hello.sh"
    for name in (b"", b"/dev", b"/run", b"/sys", b"/var", b"/proc", b"/tmp"):
        yield b"rootfs" + name, DIRECTORY, LINUXKIT_TIME, b""
    yield b"cmd", stat.S_IFREG | 0o644, LINUXKIT_TIME, b"/bin/hello.sh\n"
    yield b"env", stat.S_IFREG | 0o644, LINUXKIT_TIME, b"PATH=/bin\nHELLO=Hello from the enclave side!\n"


BOOT = linuxkit_archive(
    [
        (b"dev", DIRECTORY, LINUXKIT_TIME, b""),
        (b"init", stat.S_IFREG | 0o755, LINUXKIT_TIME, b"#!init\n"),
        (b"nsm.ko", stat.S_IFREG | 0o755, LINUXKIT_TIME, b"\x7fELF-nsm"),
    ]
)
APPLICATION = linuxkit_archive(list(_application()))

PCR0 = (
    "2ff93628c698b0557becd79ba52af8027e4c095998a8ad59c9065c43a3f2f7e561cef00ee1e380907a75da69cb19708f"  # two ramdisks
)
PCR1 = "b28b2c265941eaf3df647bf3189bb6d9eb49fe289794f6e9a91f48d44a6f61c79c6ec3b062a6908de411c62017f2d1e2"
PCR2 = "3c4d8fd8a834555e97bcaa35bbdf2375d918d20e445c6b51a9764e1f97e483a5fdc5f45e3ea026f74d07e15c3ff3e925"
PCR2_OF_NOTHING = "21b9efbc184807662e966d34f390821309eeac6802309798826296bf3e8bec7c10edb30948c90ba67310f7b964fc500a"

PARTS = {
    "k": Section(SectionType.KERNEL, BytesContent(KERNEL)),
    "c": Section(SectionType.CMDLINE, BytesContent(CMDLINE)),
    "m": Section(SectionType.METADATA, BytesContent(METADATA)),
    "0": Section(SectionType.RAMDISK, BytesContent(BOOT)),
    "1": Section(SectionType.RAMDISK, BytesContent(APPLICATION)),
    "2": Section(SectionType.RAMDISK, BytesContent(b"more")),
    "s": Section(SectionType.SIGNATURE, BytesContent(b"signature")),
}


def image(parts: str = "kcm01", *, arch: Arch = Arch.X86_64, version: int = 4) -> bytes:
    """An image of these parts."""
    out = io.BytesIO()
    write(out, [PARTS[part] for part in parts], arch=arch, version=version)
    return out.getvalue()


def patched(data: bytes, *changes: tuple[int, bytes]) -> bytes:
    """With other bytes at some offsets, and a CRC that is right again."""
    made = bytearray(data)
    for offset, change in changes:
        made[offset : offset + len(change)] = change
    made[544:548] = zlib.crc32(made[548:], zlib.crc32(made[:544])).to_bytes(4, "big")
    return bytes(made)


def saved(directory: Path, data: bytes) -> Path:
    """As a file."""
    path = directory / "image.eif"
    path.write_bytes(data)
    return path
