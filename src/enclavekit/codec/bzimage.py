# SPDX-License-Identifier: Apache-2.0
"""What a Linux kernel image says of itself: bzImage (x86_64) and Image (aarch64). No I/O.

Source: linux Documentation/arch/x86/boot.rst, Documentation/arch/arm64/booting.rst.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from struct import unpack_from

from enclavekit.errors import KernelError

HEAD_SIZE = 0x10000
"""Bytes of an image's start that hold all that is read here."""

OLDEST_PROTOCOL = 0x20C
"""Boot protocol 2.12 brought xloadflags."""

BOOT_FLAG, HEADER_MAGIC, PROTOCOL, VERSION_POINTER = 0x1FE, 0x202, 0x206, 0x20E
LOADFLAGS, ALIGNMENT, RELOCATABLE, XLOADFLAGS, CMDLINE_SIZE = 0x211, 0x230, 0x234, 0x236, 0x238
PREF_ADDRESS, INIT_SIZE, HEADER_END = 0x258, 0x260, 0x268
AARCH64_MAGIC_OFFSET = 0x38
MAX_BANNER = 512


class Arch(StrEnum):
    """Architectures that an EIF can be made for."""

    X86_64 = "x86_64"
    AARCH64 = "aarch64"


@dataclass(frozen=True, slots=True)
class Kernel:
    """Sizes and addresses in bytes; an aarch64 Image has only an architecture."""

    arch: Arch
    banner: str = ""
    """Version, builder and compiler, as ``uname`` would say it."""
    cmdline_size: int = 2047
    alignment: int = 0x200000
    preferred_address: int = 0
    init_size: int = 0
    """Memory needed from the load address on, until the kernel has set itself up."""

    @property
    def version(self) -> str:
        """The first word of the banner, ``6.12.0`` for instance; empty where there is none."""
        return self.banner.split(" ", 1)[0]

    def load_address(self, image_end: int) -> int:
        """Where the loader places the kernel (guest/loader/loader.c: place_kernel)."""
        start = max(image_end, self.preferred_address)
        return -(-start // self.alignment) * self.alignment


def parse(head: bytes) -> Kernel:
    """Read the start of a kernel image (``HEAD_SIZE`` bytes are always enough)."""
    if head[AARCH64_MAGIC_OFFSET : AARCH64_MAGIC_OFFSET + 4] == b"ARM\x64":
        return Kernel(Arch.AARCH64)
    if head[:4] == b"\x7fELF":
        raise KernelError("kernel: got an ELF file (vmlinux), expected a bzImage")
    if len(head) < HEADER_END:
        raise KernelError(f"kernel: need at least {HEADER_END} bytes of a bzImage, have {len(head)}")
    flag, magic = unpack_from("<H", head, BOOT_FLAG)[0], head[HEADER_MAGIC : HEADER_MAGIC + 4]
    if flag != 0xAA55 or magic != b"HdrS":
        raise KernelError(
            f"kernel: got boot flag 0x{flag:04x} and magic {magic!r}, expected 0xaa55 and b'HdrS' of a bzImage"
        )
    protocol = unpack_from("<H", head, PROTOCOL)[0]
    if protocol < OLDEST_PROTOCOL:
        raise KernelError(f"kernel: boot protocol 0x{protocol:04x}, expected 0x{OLDEST_PROTOCOL:04x} or newer")
    if not head[LOADFLAGS] & 1 or not unpack_from("<H", head, XLOADFLAGS)[0] & 1:
        raise KernelError("kernel: not a 64-bit bzImage that loads high")
    if not head[RELOCATABLE]:
        raise KernelError("kernel: not relocatable", hint="build it with CONFIG_RELOCATABLE")
    alignment = unpack_from("<I", head, ALIGNMENT)[0]
    if alignment == 0 or alignment & (alignment - 1):
        raise KernelError(f"kernel: alignment 0x{alignment:x}, expected a power of two")
    start = unpack_from("<H", head, VERSION_POINTER)[0] + 0x200
    banner = head[start : start + MAX_BANNER].split(b"\0", 1)[0] if start > 0x200 else b""
    return Kernel(
        arch=Arch.X86_64,
        banner=banner.decode("ascii", errors="replace"),
        cmdline_size=unpack_from("<I", head, CMDLINE_SIZE)[0],
        alignment=alignment,
        preferred_address=unpack_from("<Q", head, PREF_ADDRESS)[0],
        init_size=unpack_from("<I", head, INIT_SIZE)[0],
    )
