# SPDX-License-Identifier: Apache-2.0
"""The setup header of an x86 Linux kernel (bzImage): what a boot loader must know.

Source: linux Documentation/arch/x86/boot.rst. Offsets are from the file's start, and are the same in the zero page.
The file is a real-mode part of ``(setup_sects + 1) * 512`` bytes, then the protected-mode kernel, for 1 MiB or above.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Self

from enclavekit.errors import KernelError, TruncatedError

HEADER_OFFSET = 0x1F1
HEADER_END = 0x270
READ_SIZE = 0x20000
"""Enough of a file's start for the header and the version text: the real-mode part is at most this long."""

BOOT_FLAG = 0xAA55
HDRS = b"HdrS"
MIN_VERSION = 0x020C
MAX_BANNER_SIZE = 512

LOADED_HIGH = 0x01
"""loadflags: the protected-mode kernel goes to 1 MiB."""
KERNEL_64 = 0x0001
"""xloadflags: a 64-bit kernel, with a 64-bit entry at 0x200 of the protected-mode part."""


@dataclass(frozen=True, slots=True)
class BzImage:
    """A checked setup header. Sizes in bytes."""

    setup_sects: int
    version: int
    loadflags: int
    code32_start: int
    initrd_addr_max: int
    kernel_alignment: int
    relocatable: bool
    xloadflags: int
    cmdline_size: int
    payload_offset: int
    payload_length: int
    pref_address: int
    init_size: int
    banner: str

    LAYOUT: ClassVar[Struct] = Struct(
        "<"  #       little-endian, no padding
        "B"  # 0x1f1 setup_sects, 0 means 4
        "12x"  #     root_flags, syssize, ram_size, vid_mode, root_dev
        "H"  # 0x1fe boot_flag
        "2x"  #      jump
        "4s"  # 0x202 header
        "H"  # 0x206 version, major and minor byte
        "6x"  #      realmode_swtch, start_sys_seg
        "H"  # 0x20e kernel_version, of the text, less 0x200
        "x"  #       type_of_loader
        "B"  # 0x211 loadflags
        "2x"  #      setup_move_size
        "I"  # 0x214 code32_start
        "20x"  #     ramdisk_image, ramdisk_size, bootsect_kludge, heap_end_ptr, ext_loader_ver, ..., cmd_line_ptr
        "I"  # 0x22c initrd_addr_max
        "I"  # 0x230 kernel_alignment
        "B"  # 0x234 relocatable_kernel
        "x"  #       min_alignment
        "H"  # 0x236 xloadflags
        "I"  # 0x238 cmdline_size
        "12x"  #     hardware_subarch and its data
        "I"  # 0x248 payload_offset, from the protected-mode kernel's start
        "I"  # 0x24c payload_length
        "8x"  #      setup_data
        "Q"  # 0x258 pref_address
        "I"  # 0x260 init_size, memory needed from the load address on
        "12x"  #     handover_offset, kernel_info_offset
    )

    @property
    def protected_mode_offset(self) -> int:
        """Where the protected-mode kernel starts in the file."""
        return (self.setup_sects + 1) * 512

    @property
    def is_64_bit(self) -> bool:
        """Whether this kernel is for x86_64."""
        return bool(self.xloadflags & KERNEL_64)

    @classmethod
    def parse(cls, head: bytes, size: int) -> Self:
        """From the file's first bytes (READ_SIZE of them, or all) and its size. KernelError when it cannot boot."""
        if len(head) < HEADER_END:
            raise TruncatedError(f"bzImage header: need {HEADER_END} bytes, have {len(head)}")
        fields = cls.LAYOUT.unpack_from(head, HEADER_OFFSET)
        setup_sects, boot_flag, magic, version, text, loadflags, code32_start, initrd_addr_max = fields[:8]
        kernel_alignment, relocatable, xloadflags, cmdline_size, payload_offset, payload_length = fields[8:14]
        pref_address, init_size = fields[14:]
        if boot_flag != BOOT_FLAG:
            raise KernelError(f"bzImage header: boot flag 0x{boot_flag:04x}, expected 0x{BOOT_FLAG:04x}")
        if magic != HDRS:
            raise KernelError(f"bzImage header: magic {magic!r} at 0x202, expected {HDRS!r}")
        if version < MIN_VERSION:
            raise KernelError(f"bzImage header: boot protocol 0x{version:04x}, expected 0x{MIN_VERSION:04x} or later")
        if not loadflags & LOADED_HIGH:
            raise KernelError("bzImage header: a kernel to be loaded low (zImage), expected a bzImage")
        setup_sects = setup_sects or 4
        kernel_start = (setup_sects + 1) * 512
        if kernel_start >= size:
            raise TruncatedError(f"bzImage: protected-mode kernel at 0x{kernel_start:x} of a file of 0x{size:x} bytes")
        if payload_offset + payload_length > size - kernel_start:
            raise TruncatedError(
                f"bzImage: compressed kernel ends at 0x{kernel_start + payload_offset + payload_length:x}"
                f" of a file of 0x{size:x} bytes"
            )
        if not kernel_alignment or kernel_alignment & (kernel_alignment - 1):
            raise KernelError(f"bzImage header: kernel_alignment 0x{kernel_alignment:x}, expected a power of two")
        banner = head[text + 0x200 : text + 0x200 + MAX_BANNER_SIZE] if text else b""
        return cls(
            *(setup_sects, version, loadflags, code32_start, initrd_addr_max, kernel_alignment, bool(relocatable)),
            *(xloadflags, cmdline_size, payload_offset, payload_length, pref_address, init_size),
            banner=banner.partition(b"\0")[0].decode("ascii", "backslashreplace"),
        )
