# SPDX-License-Identifier: Apache-2.0
"""An image as lint's rules see it: opened, measured, its kernel asked, its ramdisks unpacked, each once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO

from enclavekit.codec.bzimage import READ_SIZE, BzImage
from enclavekit.eif import (
    Arch,
    Discovery,
    Examined,
    FileContent,
    Image,
    ImageSection,
    SectionType,
    examine,
)
from enclavekit.errors import FormatError, KernelError, MissingError
from enclavekit.image.initramfs import Ramdisk, open_ramdisk
from enclavekit.image.kernel import image_discovery, parse_kernel
from enclavekit.image.kernel_features import KernelFeatures, kernel_features
from enclavekit.inspection.file_system import FileSystem

MAX_CMDLINE_SIZE = 1 << 16
"""What is looked at; Linux takes 4096 bytes at most."""

LOCAL_CARRIERS = ("qemu", "kvm")
NITRO = "nitro"
CARRIERS = (NITRO, *LOCAL_CARRIERS)


@dataclass(frozen=True, slots=True)
class Subject:
    """``kernel_arch`` is None when the kernel is none, ``bzimage`` also for other architectures than x86_64.

    ``discovery`` is how ``enclave run`` would tell the kernel of its devices, if it can be run.

    ``complete``: every ramdisk could be read to its end, so what is not in ``files`` is not in the enclave.
    """

    examined: Examined
    name: str
    cmdline: bytes
    kernel_arch: Arch | None
    kernel_error: FormatError | None
    bzimage: BzImage | None
    discovery: Discovery | None
    features: KernelFeatures
    ramdisks: Sequence[Ramdisk]
    files: FileSystem
    complete: bool
    memory: int | None
    now: datetime
    carrier: str | None

    @property
    def image(self) -> Image:
        """Its structure."""
        return self.examined.image

    @property
    def words(self) -> list[str]:
        """The command line's parameters."""
        return self.cmdline.decode("utf-8", "backslashreplace").split()

    @property
    def locally(self) -> bool:
        """Whether it may be run away from EC2."""
        return self.carrier in (None, *LOCAL_CARRIERS)

    @property
    def on_ec2(self) -> bool:
        """Whether it may be run there."""
        return self.carrier in (None, NITRO)

    def parameter(self, name: str) -> str | None:
        """The value of the last ``name=value`` on the command line."""
        return next((word[len(name) + 1 :] for word in reversed(self.words) if word.startswith(name + "=")), None)


@contextmanager
def open_subject(
    file: BinaryIO, *, name: str, memory: int | None, now: datetime, carrier: str | None
) -> Iterator[Subject]:
    """Read the whole file, tolerantly; what the ramdisks hold can be read until the end of the block.

    Errors: EifError and TruncatedError when it is no image, FileError.
    """
    examined = examine(file, name)
    image = examined.image
    kernel = _section(image, SectionType.KERNEL)
    cmdline = _section(image, SectionType.CMDLINE)
    arch, bzimage, kernel_error = _kernel(file, kernel)
    content = FileContent(file, kernel.offset, kernel.size, name) if kernel and arch is not None else None
    with ExitStack() as opened:
        ramdisks = [opened.enter_context(open_ramdisk(file, section, name=name)) for section in image.ramdisks]
        files, complete = _merged(ramdisks)
        yield Subject(
            examined=examined,
            name=name,
            cmdline=_start(file, cmdline, MAX_CMDLINE_SIZE) if cmdline else b"",
            kernel_arch=arch,
            kernel_error=kernel_error,
            bzimage=bzimage,
            discovery=image_discovery(file, image) if bzimage else None,
            features=kernel_features(content) if content else KernelFeatures(),
            ramdisks=ramdisks,
            files=files,
            complete=complete,
            memory=memory,
            now=now,
            carrier=carrier,
        )


def _section(image: Image, kind: SectionType) -> ImageSection | None:
    return next((section for section in image.sections if section.type is kind), None)


def _start(file: BinaryIO, section: ImageSection, size: int) -> bytes:
    file.seek(section.offset)
    return file.read(min(size, section.size))


def _kernel(file: BinaryIO, section: ImageSection | None) -> tuple[Arch | None, BzImage | None, FormatError | None]:
    if section is None:
        return None, None, KernelError("no kernel")
    head = _start(file, section, READ_SIZE)
    try:
        arch, _, _ = parse_kernel(head, section.size)
        return arch, BzImage.parse(head, section.size) if arch is Arch.X86_64 else None, None
    except FormatError as error:
        return None, None, error


def _merged(ramdisks: Sequence[Ramdisk]) -> tuple[FileSystem, bool]:
    """What a kernel would have of them: it stops where something cannot be unpacked."""
    files = FileSystem()
    for index, ramdisk in enumerate(ramdisks):
        files.merge(index, ramdisk)
        if ramdisk.trouble:
            # Of what is only unreadable here the kernel may have made anything.
            return files, not any(isinstance(one.trouble, MissingError) for one in ramdisks)
    return files, True
