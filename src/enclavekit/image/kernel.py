# SPDX-License-Identifier: Apache-2.0
"""Kernels: checked as far as a file can tell, and how each finds its virtio-mmio devices.

Source: linux Documentation/arch/x86/boot.rst, Documentation/arch/arm64/booting.rst. A kernel with command-line devices
(CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES) is told about them there; the distributions' kernels have none and ask ACPI.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from enclavekit.codec.bzimage import HDRS, READ_SIZE, BzImage
from enclavekit.eif import Arch, Discovery, FileContent, Image, Metadata, digest_file, read_section
from enclavekit.errors import EifError, FileError, FormatError, KernelError

MAX_CONFIG_SIZE = 1 << 20

_ARM64_MAGIC = b"ARM\x64"
_ARM64_MAGIC_OFFSET = 0x38
_CMDLINE_DEVICES = "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y"
_ACPI_DISTRIBUTIONS = ("Debian", "Ubuntu")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel in an open file. ``init_size`` is the memory it needs from its load address on, in bytes.

    An Image (aarch64) has neither that (0) nor a version text ("") in its header.
    """

    content: FileContent
    arch: Arch
    banner: str
    init_size: int
    discovery: Discovery
    sha384: str

    @property
    def release(self) -> str:
        """As ``uname -r`` will print it, or nothing."""
        return self.banner.partition(" ")[0]


def open_kernel(file: BinaryIO, path: Path) -> Kernel:
    """Read and check a kernel; ``file`` stays open for its content."""
    try:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(READ_SIZE)
        arch, banner, init_size = parse_kernel(head, size)
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    except FormatError as error:
        raise KernelError(f"{path}: {error.message}", hint=error.hint) from error
    return Kernel(
        content=FileContent(file, 0, size, str(path)),
        arch=arch,
        banner=banner,
        init_size=init_size,
        discovery=_configured_discovery(path) or banner_discovery(banner),
        sha384=digest_file(file, str(path)).hex(),
    )


def parse_kernel(head: bytes, size: int) -> tuple[Arch, str, int]:
    """Architecture, version text and init_size, from a kernel's first bytes and its size."""
    if head[_ARM64_MAGIC_OFFSET : _ARM64_MAGIC_OFFSET + 4] == _ARM64_MAGIC:
        return Arch.AARCH64, "", 0
    if head[0x202:0x206] != HDRS:
        raise KernelError(
            "not a kernel: no bzImage (x86_64) and no Image (aarch64)",
            hint="vmlinux is not bootable; the bzImage is arch/x86/boot/bzImage, or /boot/vmlinuz-*",
        )
    image = BzImage.parse(head, size)
    if not image.is_64_bit:
        raise KernelError("a 32-bit kernel, expected one for x86_64")
    return Arch.X86_64, image.banner, image.init_size


def banner_discovery(banner: str) -> Discovery:
    """A guess for a kernel of which nothing else is known."""
    return Discovery.ACPI if any(name in banner for name in _ACPI_DISTRIBUTIONS) else Discovery.CMDLINE


def image_discovery(file: BinaryIO, image: Image) -> Discovery:
    """How the kernel of any EIF, ours or not, finds devices: what the metadata say, else what the banner suggests."""
    if image.metadata:
        try:
            kernel = Metadata.parse(read_section(file, image.metadata)).kernel
        except EifError:  # others put there what they like
            kernel = None
        if kernel:
            return kernel.discovery
    file.seek(image.kernel.offset)
    _, banner, _ = parse_kernel(file.read(min(READ_SIZE, image.kernel.size)), image.kernel.size)
    return banner_discovery(banner)


def _configured_discovery(path: Path) -> Discovery | None:
    """From the configuration beside the kernel, if there is one."""
    for beside in (path.with_name(path.name.replace("vmlinuz-", "config-", 1)), path.with_name(path.name + ".config")):
        if beside == path:
            continue
        try:
            with beside.open("rb") as file:
                lines = file.read(MAX_CONFIG_SIZE).decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise FileError.of(error, beside, "read") from error
        return Discovery.CMDLINE if _CMDLINE_DEVICES in lines else Discovery.ACPI
    return None
