# SPDX-License-Identifier: Apache-2.0
"""Boot protocols other than ``eif``: the host does what the loader in the ROM would do, before the machine starts.

The image is written whole, its checksum checked, behind the room that the kernel takes; the ramdisks stay in it where
they are. What is measured is the image, so PCRs do not depend on the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from struct import pack_into

from enclavekit import eif
from enclavekit.codec.bzimage import READ_SIZE, BzImage
from enclavekit.eif.layout import SECTION_HEADER_SIZE
from enclavekit.errors import KernelError, LaunchError, NotEnoughMemoryError
from enclavekit.image.decompress import LONGEST_MAGIC, Decompression, compression_of
from enclavekit.platform import pvh, zero_page
from enclavekit.platform.guest_memory import GuestMemory, MemoryFile
from enclavekit.platform.machine import (
    CMDLINE,
    CMDLINE_LIMIT,
    MIB,
    START_INFO,
    ZERO_PAGE,
    BootProtocol,
    low_memory_end,
    memory_map,
)
from enclavekit.platform.placement import image_address
from enclavekit.platform.rom import Boot

PAGE = 4096
SETUP_HEAP_END = 0xE000 - 0x200
"""In the setup's segment; its stack is above (guest/loader/loader.h: SETUP_STACK_TOP)."""
MAX_VMLINUX_SIZE = 1 << 30
VMLINUX_HISTORY = 1 << 27


def lay_image(
    boot: Boot, protocol: BootProtocol, memory: GuestMemory, kernel: BzImage, write: Callable[[int], None]
) -> Boot:
    """Lay down an EIF with this kernel for ``protocol``; what the ROM then has to say of it.

    ``write`` puts the whole image at an address and checks it. Errors: ``EifError``, ``KernelError``, ``LaunchError``.
    """
    if not kernel.relocatable or kernel.pref_address < MIB:
        raise KernelError(
            f"kernel: preferred address 0x{kernel.pref_address:x}, expected a relocatable kernel above 1 MiB"
        )
    base = image_address(kernel)
    end = low_memory_end(boot.memory)
    if base + boot.image_size > end:
        raise NotEnoughMemoryError(
            f"memory: kernel and image end at 0x{base + boot.image_size:x}, RAM below 4 GiB at 0x{end:x}",
            hint="more --memory",
        )
    write(base)
    # From here on, what was written and checked counts.
    image = eif.read(MemoryFile(memory, base, boot.image_size))
    setup = memory.read(base + image.kernel.offset, min(READ_SIZE, image.kernel.size))
    if BzImage.parse(setup, image.kernel.size) != kernel:
        raise LaunchError("image: it changed while it was being read")
    text = memory.read(base + image.cmdline.offset, image.cmdline.size) + boot.suffix()
    limit = min(kernel.cmdline_size, CMDLINE_LIMIT - 1)
    if len(text) > limit:
        raise LaunchError(f"command line: {len(text)} bytes with what the machine adds, this kernel takes {limit}")
    memory.write(CMDLINE, text + b"\0")
    start = entry = kernel.pref_address
    if protocol is BootProtocol.PVH:
        entry = _lay_vmlinux(memory, kernel, base + image.kernel.offset)
    else:
        skip = kernel.protected_mode_offset
        memory.write_chunks(start, memory.chunks(base + image.kernel.offset + skip, image.kernel.size - skip))
    # The kernel first: ramdisks may move down over its section.
    initrd = _join(memory, [(base + section.offset, section.size) for section in image.ramdisks])
    if protocol is BootProtocol.PVH:
        info = pvh.start_info(
            START_INFO, initrd=initrd, cmdline=CMDLINE, rsdp=boot.rsdp, entries=memory_map(boot.memory)
        )
        memory.write(START_INFO, info)
        return replace(boot, protocol=protocol, image_base=base, entry=entry, argument=START_INFO)
    if protocol is BootProtocol.LINUX:
        page = zero_page.zero_page(
            setup, kernel=start, initrd=initrd, cmdline=CMDLINE, rsdp=boot.rsdp, entries=memory_map(boot.memory)
        )
    else:
        page = _setup(setup[: kernel.protected_mode_offset], start, initrd)
    memory.write(ZERO_PAGE, page)
    return replace(boot, protocol=protocol, image_base=base, entry=start, argument=ZERO_PAGE)


def _join(memory: GuestMemory, ramdisks: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """One range that Linux unpacks as all ramdisks: it skips zeros between archives (guest/loader/loader.c)."""
    address, size = ramdisks[0]
    start = address // PAGE * PAGE
    if start != address:
        memory.write_chunks(start, memory.chunks(address, size))
    for address, more in ramdisks[1:]:
        end = start + size
        if address == end + SECTION_HEADER_SIZE:
            memory.write(end, bytes(SECTION_HEADER_SIZE))
            size += SECTION_HEADER_SIZE + more
        else:
            memory.write_chunks(end, memory.chunks(address, more))
            size += more
    return start, size


def _setup(setup: bytes, kernel: int, initrd: tuple[int, int]) -> bytes:
    """The kernel's real-mode part, with a loader's fields filled in."""
    made = bytearray(setup)
    zero_page.fill_header(made, kernel=kernel, initrd=initrd, cmdline=CMDLINE, vid_mode=zero_page.VIDEO_CURRENT_MODE)
    made[zero_page.LOADFLAGS] |= zero_page.CAN_USE_HEAP
    pack_into("<H", made, zero_page.HEAP_END_PTR, SETUP_HEAP_END)
    return bytes(made)


def _lay_vmlinux(memory: GuestMemory, kernel: BzImage, file_address: int) -> int:
    """Unpack the kernel inside the bzImage at ``file_address`` to where it wants to be; its PVH entry."""
    payload = file_address + kernel.protected_mode_offset + kernel.payload_offset
    compression = compression_of(memory.read(payload, min(LONGEST_MAGIC, kernel.payload_length)))
    chunks = memory.chunks(payload, kernel.payload_length)
    if compression is not None:
        unpacked = Decompression(chunks, compression, "kernel", limit=MAX_VMLINUX_SIZE, history=VMLINUX_HISTORY)
        chunks = iter(unpacked)
    return pvh.load_vmlinux(memory, chunks, kernel.pref_address, kernel.pref_address + kernel.init_size)
