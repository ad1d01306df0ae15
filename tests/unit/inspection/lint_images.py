# SPDX-License-Identifier: Apache-2.0
"""Whole images for lint's tests: clean ones of both layouts, of which a test changes one thing."""

from __future__ import annotations

import gzip
import io
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from eif_images import METADATA
from elf_files import elf_file
from kernel_files import bzimage, kernel_proper

from enclavekit.codec import cpio
from enclavekit.codec.init_config import InitConfig
from enclavekit.eif import Arch, BytesContent, FileContent, ImageSection, Section, SectionType, write
from enclavekit.image.initramfs import Ramdisk, open_ramdisk
from enclavekit.inspection.findings import Finding
from enclavekit.inspection.lint import lint

NOW = datetime(2026, 11, 24, tzinfo=UTC)
DIRECTORY = stat.S_IFDIR | 0o755
FILE = stat.S_IFREG | 0o644
PROGRAM = stat.S_IFREG | 0o755
SYMLINK = stat.S_IFLNK | 0o777

STATIC = elf_file()
CMDLINE = b"reboot=k panic=1 pci=off console=ttyS0 quiet random.trust_cpu=on"
CONFIG = InitConfig(arguments=(b"/bin/app", b"-v"), uid=1000, gid=1000)
KERNEL = bzimage(gzip.compress(kernel_proper(), mtime=0))

Files = Mapping[str, tuple[int, bytes]]
"""By path: mode and data."""


def archive(files: Files, *, uid: int = 0, gid: int = 0) -> bytes:
    """A plain cpio, in the order given."""
    entries = [
        (cpio.Entry(path.encode(), mode, len(data), ino, uid=uid, gid=gid), [data])
        for ino, (path, (mode, data)) in enumerate(files.items(), 1)
    ]
    return b"".join(cpio.archive(entries))


BOOT: Files = {"dev": (DIRECTORY, b""), "init": (PROGRAM, STATIC)}
APPLICATION: Files = {
    "config": (FILE, CONFIG.encode()),
    "rootfs": (DIRECTORY, b""),
    "rootfs/bin": (DIRECTORY, b""),
    "rootfs/bin/app": (PROGRAM, STATIC),
}
NITRO_APPLICATION: Files = {
    "rootfs": (DIRECTORY, b""),
    "rootfs/bin": (DIRECTORY, b""),
    "rootfs/bin/app": (PROGRAM, STATIC),
    "rootfs/tmp": (DIRECTORY, b""),
    "cmd": (FILE, b"/bin/app\n-v\n"),
    "env": (FILE, b"PATH=/bin\n"),
}


@dataclass
class Recipe:
    """An image's parts. Clean as it stands; ``nitro`` makes a clean one in nitro-cli's layout."""

    kernel: bytes = KERNEL
    cmdline: bytes = CMDLINE
    metadata: bytes | None = METADATA
    boot: dict[str, tuple[int, bytes]] = field(default_factory=lambda: dict(BOOT))
    application: dict[str, tuple[int, bytes]] = field(default_factory=lambda: dict(APPLICATION))
    ramdisks: Sequence[bytes] | None = None
    """Instead of boot and application."""
    arch: Arch = Arch.X86_64
    version: int = 4

    @classmethod
    def nitro(cls) -> Recipe:
        return cls(application=dict(NITRO_APPLICATION))

    def made(self) -> bytes:
        ramdisks = self.ramdisks
        if ramdisks is None:
            ramdisks = [archive(self.boot), archive(self.application)]
        sections = [
            Section(SectionType.KERNEL, BytesContent(self.kernel)),
            Section(SectionType.CMDLINE, BytesContent(self.cmdline)),
            *([Section(SectionType.METADATA, BytesContent(self.metadata))] if self.metadata is not None else []),
            *(Section(SectionType.RAMDISK, BytesContent(ramdisk)) for ramdisk in ramdisks),
        ]
        out = io.BytesIO()
        write(out, sections, arch=self.arch, version=self.version)
        return out.getvalue()


def linted(
    directory: Path, made: Recipe | bytes, *, memory: int | None = 1 << 30, carrier: str | None = None
) -> list[Finding]:
    """What lint finds; with plenty of memory, so that its need is no finding."""
    path = directory / "linted.eif"
    path.write_bytes(made if isinstance(made, bytes) else made.made())
    with path.open("rb") as file:
        return list(lint(file, name="linted.eif", memory=memory, now=NOW, carrier=carrier))


@contextmanager
def unpacked(directory: Path, data: bytes, name: str = "ramdisk") -> Iterator[Ramdisk]:
    """A ramdisk of these bytes, opened."""
    path = directory / name
    path.write_bytes(bytes(12) + data)
    with path.open("rb") as file, open_ramdisk(file, ramdisk_section(data), name=name) as ramdisk:
        yield ramdisk


def ramdisk_section(data: bytes) -> ImageSection:
    return ImageSection(SectionType.RAMDISK, 0, len(data))


def content(file: BinaryIO) -> FileContent:
    return FileContent(file, 0, file.seek(0, 2), "file")
