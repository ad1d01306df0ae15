# SPDX-License-Identifier: Apache-2.0
"""Kernels for the tests: a right header, and inside what a scan would find, but nothing to run."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from struct import pack_into

from enclavekit.image.kernel_features import Feature

RELEASE = "6.12.1-test"
BANNER = f"{RELEASE} (someone@somewhere) #1 SMP"


def kernel_proper(
    without: Iterable[Feature] = (), *, release: str = RELEASE, configuration: str | None = None
) -> bytes:
    """Uncompressed: the strings of all features but some, and maybe a configuration."""
    strings = [feature.value.string for feature in Feature if feature not in without]
    data = b"\x7fELF" + bytes(100) + f"Linux version {release} (gcc) ".encode() + b"\0" + b"\0".join(strings) + b"\0"
    if configuration is not None:
        data += b"IKCFG_ST" + gzip.compress(configuration.encode(), mtime=0) + b"IKCFG_ED"
    return data + bytes(100)


def bzimage(payload: bytes, *, banner: str = BANNER, cmdline_size: int = 2047, init_size: int = 0x2000000) -> bytes:
    """A bzImage that holds this payload, compressed or not."""
    data = bytearray(0x600)
    text = 0x300
    data[text : text + len(banner)] = banner.encode()
    pack_into("<H", data, 0x1FE, 0xAA55)
    data[0x1F1], data[0x211], data[0x234] = 1, 1, 1
    data[0x202:0x206] = b"HdrS"
    pack_into("<H", data, 0x206, 0x20F)
    pack_into("<H", data, 0x20E, text - 0x200)
    pack_into("<H", data, 0x236, 3)
    pack_into("<I", data, 0x22C, 0x7FFFFFFF)
    pack_into("<I", data, 0x230, 0x200000)
    pack_into("<I", data, 0x238, cmdline_size)
    pack_into("<II", data, 0x248, 0x200, len(payload))
    pack_into("<Q", data, 0x258, 0x1000000)
    pack_into("<I", data, 0x260, init_size)
    return bytes(data) + payload + bytes(16)


def arm64_image(content: bytes) -> bytes:
    """An Image, which is the kernel proper behind a header."""
    return b"MZ" + bytes(0x36) + b"ARM\x64" + bytes(4) + content


def zboot(payload: bytes) -> bytes:
    """A compressed kernel in an EFI program."""
    head = bytearray(64)
    head[:8] = b"MZ\0\0zimg"
    pack_into("<II", head, 8, len(head), len(payload))
    return bytes(head) + payload
