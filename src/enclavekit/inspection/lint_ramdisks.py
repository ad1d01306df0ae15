# SPDX-License-Identifier: Apache-2.0
"""Rules about the ramdisks, what the kernel makes of them together, and the init that it runs out of them."""

from __future__ import annotations

from collections.abc import Iterator

from enclavekit.errors import MissingError
from enclavekit.image.initramfs import Archive
from enclavekit.image.kernel_features import Answer, Feature
from enclavekit.inspection.executable import execute
from enclavekit.inspection.file_system import PathError, find, shown
from enclavekit.inspection.findings import Finding, found
from enclavekit.inspection.process import Process
from enclavekit.inspection.subject import Subject

MAX_NAMED = 5
"""Files of one kind that are named one by one; the others are counted."""


def ramdisk_rules(subject: Subject) -> Iterator[Finding]:
    """All of them."""
    stopped = None
    base = 0
    for index, (section, ramdisk) in enumerate(zip(subject.image.ramdisks, subject.ramdisks, strict=True)):
        where = f"ramdisk {index}"
        for archive in ramdisk.archives:
            yield from _archive(subject, where, archive, base)
        if ramdisk.trouble:
            code = "ramdisk-unread" if isinstance(ramdisk.trouble, MissingError) else "ramdisk"
            yield found(code, where, ramdisk.trouble.message, hint=ramdisk.trouble.hint)
            stopped = index if stopped is None else stopped
        base += section.size
    if stopped is not None and stopped + 1 < len(subject.ramdisks):
        message = f"ramdisks {stopped + 1} and up are not checked: they come after one that ends badly"
        yield found("ramdisk-unread", f"ramdisk {stopped + 1}", message)
    yield from _files(subject)


def _archive(subject: Subject, where: str, archive: Archive, base: int) -> Iterator[Finding]:
    if archive.compression is None:
        if (base + archive.offset) % 4:
            yield found(
                "ramdisk-alignment",
                where,
                f"a plain archive at 0x{base + archive.offset:x} of all ramdisks together, expected a multiple of 4",
                hint="fill the ramdisk before it up with zeros to a multiple of 4",
            )
    elif subject.features.has(Feature[archive.compression.upper()]) is Answer.NO:
        message = f"compressed with {archive.compression}, and the kernel has no decompressor for that"
        hint = f"CONFIG_RD_{archive.compression.upper()}=y, or an uncompressed ramdisk"
        yield found("ramdisk-compression", where, message, hint=hint)


def _files(subject: Subject) -> Iterator[Finding]:
    replaced = subject.files.replaced
    for one in replaced[:MAX_NAMED]:
        message = f"replaces the one of ramdisk {one.first}"
        yield found("file-replaced", f"ramdisk {one.second}: /{shown(one.path)}", message)
    if len(replaced) > MAX_NAMED:
        yield found("file-replaced", "ramdisks", f"{len(replaced) - MAX_NAMED} more files are replaced")
    dropped = subject.files.dropped
    for path, index, why in dropped[:MAX_NAMED]:
        hint = "directories stand in an archive before what lies in them"
        yield found("file-dropped", f"ramdisk {index}: /{shown(path)}", f"cannot be made: {why}", hint=hint)
    if len(dropped) > MAX_NAMED:
        yield found("file-dropped", "ramdisks", f"{len(dropped) - MAX_NAMED} more files cannot be made")


def init_rules(subject: Subject) -> Iterator[Finding]:
    """Whether the kernel finds an init, and can run it."""
    path = (subject.parameter("rdinit") or "/init").split(",")[0].encode("utf-8", "surrogateescape")
    where = shown(path)
    try:
        find(subject.files.root, path)
    except PathError as error:
        if subject.complete:
            hint = "the kernel runs /init of the ramdisks, or what rdinit= names"
            yield found("init-missing", where, f"no init: {error}", hint=hint)
        return
    process = Process(subject.files.root, subject.image.arch)
    for problem in execute(process, path):
        if problem.kind in ("interpreter", "library") and not subject.complete:
            continue
        static = "make init a static program" if problem.kind in ("interpreter", "library") else None
        yield found(f"init-{problem.kind}", where, problem.message, hint=static)
