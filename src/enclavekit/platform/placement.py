# SPDX-License-Identifier: Apache-2.0
"""How much memory an image needs, known before anything is started.

The loader puts the kernel past the image and leaves it room to unpack itself; then the kernel unpacks the ramdisks into
its root file system, which Linux limits to half of the RAM (linux: mm/shmem.c), while they still lie where they were.
"""

from __future__ import annotations

from enclavekit.codec.bzimage import BzImage
from enclavekit.errors import ImageTooLargeError, LaunchError, NotEnoughMemoryError
from enclavekit.linux.nitro_enclaves import NE_MIN_ENCLAVE_MEM_SIZE
from enclavekit.platform.machine import GIB, IMAGE_LOAD_OFFSET, LOW_MEMORY_LIMIT, MIB, BootProtocol

PAGE = 4096
WORKING_MEMORY = 32 * MIB
"""What a distribution's kernel takes for itself beside its image, and as much again for the application."""

COMFORT = 1.5
"""``auto`` gives this much more than what is needed, and no less than the smallest."""
SMALLEST_AUTO = 256 * MIB
LARGEST = 64 * GIB

NITRO_CLI_FACTOR = 4
"""nitro-cli asks for this many times the image's size, and lets a real enclave have no less."""


def load_address(kernel: BzImage, image_end: int) -> int:
    """Where the loader places the kernel (guest/loader/loader.c: place_kernel)."""
    start = max(image_end, kernel.pref_address)
    return -(-start // kernel.kernel_alignment) * kernel.kernel_alignment


def image_address(kernel: BzImage) -> int:
    """Where the host puts the image when it lays the kernel down itself: the first page behind the kernel's room."""
    return -(-(kernel.pref_address + kernel.init_size) // PAGE) * PAGE


def needed_memory(
    kernel: BzImage, image_size: int, ramdisks_size: int, protocol: BootProtocol = BootProtocol.EIF
) -> int:
    """Bytes of RAM, in whole MiB, below which the image cannot boot. Errors: ``ImageTooLargeError``."""
    if protocol is BootProtocol.EIF:
        kernel_end = load_address(kernel, IMAGE_LOAD_OFFSET + image_size) + kernel.init_size
    else:
        kernel_end = image_address(kernel) + image_size
    if kernel_end > LOW_MEMORY_LIMIT:
        raise ImageTooLargeError(
            f"image of {image_size} bytes: with its kernel it ends at 0x{kernel_end:x}, expected at most "
            f"0x{LOW_MEMORY_LIMIT:x}: a local machine's memory has a hole there",
            hint="local boot takes images of about 2.9 GiB; real enclaves take larger ones",
        )
    needed = max(kernel_end + ramdisks_size, 2 * ramdisks_size) + WORKING_MEMORY
    return _whole_mib(needed)


def choose_memory(needed: int, wanted: int | None) -> int:
    """``wanted`` bytes if that is enough, or a comfortable size. Errors: ``NotEnoughMemoryError``, ``LaunchError``."""
    if wanted is None:
        return max(SMALLEST_AUTO, _whole_mib(int(needed * COMFORT)))
    _check_enough(needed, wanted)
    if wanted > LARGEST or wanted % MIB:
        raise LaunchError(f"memory: got {wanted} bytes, expected whole MiB up to {LARGEST // GIB} GiB")
    return wanted


def needed_nitro_memory(image_size: int) -> int:
    """Bytes, in whole MiB, that a real enclave cannot do without: the driver's least, and room for the image."""
    return max(NE_MIN_ENCLAVE_MEM_SIZE, _whole_mib(IMAGE_LOAD_OFFSET + image_size))


def choose_nitro_memory(image_size: int, wanted: int | None) -> int:
    """``wanted`` bytes of a real enclave if that is enough, or nitro-cli's size. Errors: ``NotEnoughMemoryError``."""
    needed = needed_nitro_memory(image_size)
    if wanted is None:
        return max(needed, _whole_mib(NITRO_CLI_FACTOR * image_size))
    _check_enough(needed, wanted)
    return wanted


def _whole_mib(size: int) -> int:
    return -(-size // MIB) * MIB


def _check_enough(needed: int, wanted: int) -> None:
    if wanted < needed:
        raise NotEnoughMemoryError(
            f"memory: got {wanted / MIB:g} MiB, this image needs at least {needed // MIB} MiB",
            hint=f"--memory {needed // MIB}M, or --memory auto",
        )
