# SPDX-License-Identifier: Apache-2.0
"""Takes an image apart: every section as a file, and the files of its ramdisks if wanted; all of it, or nothing."""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from enclavekit.eif import FileContent, Image, SectionType
from enclavekit.errors import FileError, FormatError
from enclavekit.image.initramfs import open_ramdisk
from enclavekit.inspection.unpack import unpack

_NAMES = {
    SectionType.KERNEL: "kernel",
    SectionType.CMDLINE: "cmdline",
    SectionType.RAMDISK: "ramdisk",
    SectionType.SIGNATURE: "signature.cbor",
    SectionType.METADATA: "metadata.json",
}


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was made, a file or directory. ``compressions`` are a ramdisk's archives'; ``notes`` are sentences."""

    section: str
    path: Path
    size: int
    files: int | None = None
    compressions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def section_names(image: Image) -> list[str]:
    """A name for each section: ``kernel``, ``ramdisk-0``; of what is there twice, the later ones get their index."""
    names: list[str] = []
    ramdisks = 0
    for index, section in enumerate(image.sections):
        name = _NAMES.get(section.type, section.kind) if isinstance(section.type, SectionType) else section.kind
        if section.type is SectionType.RAMDISK:
            name = f"ramdisk-{ramdisks}"
            ramdisks += 1
        names.append(f"section-{index}-{name}" if name in names else name)
    return names


def extract(
    file: BinaryIO,
    image: Image,
    directory: Path,
    *,
    name: str,
    rootfs: bool = False,
    devices: bool = False,
    owners: bool = False,
) -> list[Extracted]:
    """Write the sections to ``directory``, which is made if need be; ramdisks get the suffix ``.cpio``.

    ``rootfs`` also unpacks them, to ``ramdisk-N/``; see ``unpack`` for ``devices`` and ``owners``. What is in the
    directory is never touched: FileError when a name is taken. FormatError for a ramdisk that leads out of it.
    """
    work = directory / f".enclavekit-{secrets.token_hex(8)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        work.mkdir(mode=0o700)
    except OSError as error:
        raise FileError.of(error, directory, "write") from error
    try:
        made = _extract(file, image, work, name, rootfs=rootfs, devices=devices, owners=owners)
        return _move(made, work, directory)
    finally:
        _remove(work)


def _extract(
    file: BinaryIO, image: Image, work: Path, name: str, *, rootfs: bool, devices: bool, owners: bool
) -> list[Extracted]:
    made = []
    for section, section_name in zip(image.sections, section_names(image), strict=True):
        ramdisk = section.type is SectionType.RAMDISK
        path = work / (f"{section_name}.cpio" if ramdisk else section_name)
        try:
            with path.open("xb") as out:
                for chunk in FileContent(file, section.offset, section.size, name).chunks():
                    out.write(chunk)
        except OSError as error:
            raise FileError.of(error, path.name, "write") from error
        if not ramdisk:
            made.append(Extracted(section.kind, path, section.size))
            continue
        with open_ramdisk(file, section, name=name, scratch=work) as opened:
            compressions = tuple(archive.compression or "none" for archive in opened.archives)
            trouble = (f"{opened.trouble.message}: not all of it could be read",) if opened.trouble else ()
            made.append(Extracted(section.kind, path, section.size, None, compressions, trouble))
            if rootfs:
                place = work / section_name
                place.mkdir()
                try:
                    done = unpack(opened, place, devices=devices, owners=owners)
                except FormatError as error:
                    raise type(error)(f"{section_name}: {error.message}", hint=error.hint) from error
                notes = tuple(f"{count} left out: {what}" for what, count in done.left_out.items())
                made.append(Extracted(section.kind, place, opened.unpacked_size, done.files, compressions, notes))
    return made


def _move(made: list[Extracted], work: Path, directory: Path) -> list[Extracted]:
    targets = [directory / one.path.relative_to(work) for one in made]
    for target in targets:
        if target.is_symlink() or target.exists():
            raise FileError(f"{target}: exists already, and is left alone", hint="extract to an empty directory")
    moved = []
    for one, target in zip(made, targets, strict=True):
        try:
            one.path.rename(target)
        except OSError as error:
            raise FileError.of(error, target, "write") from error
        moved.append(Extracted(one.section, target, one.size, one.files, one.compressions, one.notes))
    return moved


def _remove(work: Path) -> None:
    """Also directories that may not be written to."""
    for path, directories, _ in os.walk(work):
        for name in directories:
            below = Path(path, name)
            if not below.is_symlink():
                below.chmod(0o700)
    shutil.rmtree(work, ignore_errors=True)
