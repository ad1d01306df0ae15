# SPDX-License-Identifier: Apache-2.0
"""What differs between two images, and which PCR it moves: down to the file in the ramdisk, and what of that file.

Sections are paired by type, ramdisks by their place. Headers, metadata and the signature's own bytes move no PCR.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

from enclavekit.codec.bzimage import READ_SIZE
from enclavekit.eif import (
    Content,
    FileContent,
    Image,
    ImageSection,
    Measured,
    SectionType,
    Signature,
    measure,
    read_section,
)
from enclavekit.eif.layout import HEADER_SIZE
from enclavekit.errors import Error, FormatError, KernelError, SignatureError
from enclavekit.image.initramfs import open_ramdisk
from enclavekit.image.kernel import parse_kernel
from enclavekit.inspection.compare import different_blocks, same, same_joined
from enclavekit.inspection.diff_ramdisk import FileDifference, compare_ramdisks

MAX_SHOWN = 100
"""Words of a command line, keys of metadata."""

_HEADER_FIELDS = ("version", "flags", "default_mem", "default_cpus", "reserved", "unused")
_PLATFORM = ("PCR0", "PCR1")


@dataclass(frozen=True, slots=True)
class Opened:
    """One of the two images: ``file`` stays open."""

    file: BinaryIO
    image: Image
    name: str

    def content(self, section: ImageSection) -> FileContent:
        """A section's data."""
        return FileContent(self.file, section.offset, section.size, self.name)


@dataclass(slots=True)
class Difference:
    """A place that differs, the PCRs that it can move, sentences about it, and of a ramdisk the files that differ."""

    where: str
    pcrs: tuple[str, ...]
    details: list[str] = field(default_factory=list)
    files: list[FileDifference] = field(default_factory=list)


@dataclass(slots=True)
class Comparison:
    """All differences, and which PCRs moved (None: not there in either). ``measured`` when it was asked for."""

    differences: list[Difference]
    moved: dict[str, bool]
    measured: tuple[Measured, Measured] | None = None

    @property
    def same(self) -> bool:
        """Byte for byte."""
        return not self.differences


def compare(one: Opened, other: Opened, *, pcrs: bool = True) -> Comparison:
    """Compare two inspected images; ``pcrs`` computes their measurements as well, which takes several times as long."""
    if not pcrs:
        differences = list(_differences(one, other))
        return Comparison(differences, _moved(one, other, differences))
    with ThreadPoolExecutor(max_workers=2) as pool:
        measuring = [pool.submit(measure, side.file, side.image, name=side.name) for side in (one, other)]
        differences = list(_differences(one, other))
        ours, theirs = (task.result() for task in measuring)
    before, after = ours.measurements, theirs.measurements
    moved = {
        "PCR0": before.pcr0 != after.pcr0,
        "PCR1": before.pcr1 != after.pcr1,
        "PCR2": before.pcr2 != after.pcr2,
        "PCR8": _pcr8(one) != _pcr8(other),
    }
    return Comparison(differences, moved, (ours, theirs))


def _differences(one: Opened, other: Opened) -> Iterator[Difference]:
    found = False
    for difference in _parts(one, other):
        found = True
        yield difference
    heads = [b"".join(FileContent(side.file, 0, HEADER_SIZE, side.name).chunks()) for side in (one, other)]
    if not found and heads[0] != heads[1]:
        # All that the table and the CRC are made of is the same, so one of them is wrong.
        crcs = _changed("CRC", *(f"0x{side.image.header.crc:08x}" for side in (one, other)))
        yield Difference("header", (), crcs or ["the table of sections"])


def _parts(one: Opened, other: Opened) -> Iterator[Difference]:
    yield from _header(one.image, other.image)
    pairs = _pairs(one.image, other.image)
    for (name, pcrs), (ours, theirs) in pairs.items():
        if ours is None or theirs is None:
            side, section = (one, ours) if ours else (other, theirs)
            assert section is not None  # noqa: S101 - one of the two is there
            yield Difference(name, pcrs, [f"only in {side.name}: {section.size} bytes"])
        elif ours.type is SectionType.RAMDISK:
            found = _ramdisk(one, ours, other, theirs)
            if found:
                yield Difference(name, pcrs, *found)
        elif not same(one.content(ours), other.content(theirs)):
            moves = () if pcrs == ("PCR8",) and _pcr8(one) == _pcr8(other) else pcrs
            yield Difference(name, moves, _details(one, ours, other, theirs))
        if ours and theirs and ours.flags != theirs.flags:
            yield Difference(name, (), [f"section flags 0x{ours.flags:04x}, then 0x{theirs.flags:04x}"])
    yield from _layout(one, other)


def _header(one: Image, other: Image) -> Iterator[Difference]:
    for name in _HEADER_FIELDS:
        ours, theirs = getattr(one.header, name), getattr(other.header, name)
        if ours != theirs:
            yield Difference("header", (), [f"{name} 0x{ours:x}, then 0x{theirs:x}"])


def _layout(one: Opened, other: Opened) -> Iterator[Difference]:
    """Order of sections, bytes between and behind them, and a checksum that is wrong in one of them."""
    kinds = [[section.kind for section in side.image.sections] for side in (one, other)]
    if sorted(kinds[0]) == sorted(kinds[1]) and kinds[0] != kinds[1]:
        # The measured parts' own order matters only among themselves.
        measured = [[kind for kind in order if kind in ("kernel", "cmdline", "ramdisk")] for order in kinds]
        pcrs = _PLATFORM if measured[0] != measured[1] else ()
        yield Difference("order", pcrs, [f"{', '.join(kinds[0])}; then {', '.join(kinds[1])}"])
    rests = [_between(side) for side in (one, other)]
    if not same_joined(*rests) or [part.size for part in rests[0]] != [part.size for part in rests[1]]:
        sizes = [sum(part.size for part in rest) for rest in rests]
        yield Difference("padding", (), [f"{sizes[0]} bytes between or behind sections, then {sizes[1]}"])


def _between(side: Opened) -> list[Content]:
    end, parts = HEADER_SIZE, []
    for section in side.image.sections:
        parts.append((end, section.header_offset))
        end = section.end
    parts.append((end, side.image.size))
    return [FileContent(side.file, start, stop - start, side.name) for start, stop in parts if start < stop]


def _pairs(
    one: Image, other: Image
) -> dict[tuple[str, tuple[str, ...]], tuple[ImageSection | None, ImageSection | None]]:
    pairs: dict[tuple[str, tuple[str, ...]], tuple[ImageSection | None, ImageSection | None]] = {}
    ours, theirs = _named(one), _named(other)
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        pairs[key] = ours.get(key), theirs.get(key)
    return pairs


def _named(image: Image) -> dict[tuple[str, tuple[str, ...]], ImageSection]:
    """Each section by a name that its partner has as well, and the PCRs that it is measured into."""
    named: dict[tuple[str, tuple[str, ...]], ImageSection] = {}
    counts: dict[str, int] = {}
    for section in image.sections:
        index = counts.get(section.kind, 0)
        counts[section.kind] = index + 1
        name = f"{section.kind}-{index}" if section.type is SectionType.RAMDISK or index else section.kind
        pcrs: tuple[str, ...] = ()
        if section.type in (SectionType.KERNEL, SectionType.CMDLINE) or name == "ramdisk-0":
            pcrs = _PLATFORM
        elif section.type is SectionType.RAMDISK:
            pcrs = ("PCR0", "PCR2")
        elif section.type is SectionType.SIGNATURE:
            pcrs = ("PCR8",)
        named[name, pcrs] = section
    return named


def _moved(one: Opened, other: Opened, differences: list[Difference]) -> dict[str, bool]:
    """Without hashes. What differs in one section can be made up for in the next, when both end elsewhere."""
    touched = {pcr for difference in differences for pcr in difference.pcrs}
    moved = {}
    for pcr in ("PCR0", "PCR1", "PCR2"):
        moved[pcr] = pcr in touched
        parts = [
            [side.content(section) for (_, pcrs), section in _named(side.image).items() if pcr in pcrs]
            for side in (one, other)
        ]
        sizes = [[part.size for part in side] for side in parts]
        if moved[pcr] and sizes[0] != sizes[1] and sum(sizes[0]) == sum(sizes[1]):
            moved[pcr] = not same_joined(list(parts[0]), list(parts[1]))
    moved["PCR8"] = _pcr8(one) != _pcr8(other)
    return moved


def _pcr8(side: Opened) -> bytes | None:
    if side.image.signature is None:
        return None
    try:
        return Signature.parse(read_section(side.file, side.image.signature)).certificate.pcr8
    except (FormatError, SignatureError):
        return b""


def _ramdisk(
    one: Opened, ours: ImageSection, other: Opened, theirs: ImageSection
) -> tuple[list[str], list[FileDifference]] | None:
    blocks: list[int] | None = None
    if ours.size == theirs.size:
        blocks = different_blocks(one.content(ours), other.content(theirs))
        if not blocks:
            return None
    with (
        open_ramdisk(one.file, ours, name=one.name) as before,
        open_ramdisk(other.file, theirs, name=other.name) as after,
    ):
        return compare_ramdisks(before, after, blocks, one.content(ours), other.content(theirs))


def _details(one: Opened, ours: ImageSection, other: Opened, theirs: ImageSection) -> list[str]:
    """In words, for sections that are not ramdisks."""
    details = [f"{ours.size} bytes, then {theirs.size}"] if ours.size != theirs.size else []
    try:
        match ours.type:
            case SectionType.KERNEL:
                details += _changed("version", _banner(one, ours), _banner(other, theirs))
            case SectionType.CMDLINE:
                words = [read_section(side.file, part).split() for side, part in ((one, ours), (other, theirs))]
                details += [f"without {_shown(word)}" for word in words[0] if word not in words[1]][:MAX_SHOWN]
                details += [f"with {_shown(word)}" for word in words[1] if word not in words[0]][:MAX_SHOWN]
                if not details:
                    details = ["the order or spacing of its words"]
            case SectionType.METADATA:
                details += _metadata(read_section(one.file, ours), read_section(other.file, theirs))
            case SectionType.SIGNATURE:
                details += _signature(read_section(one.file, ours), read_section(other.file, theirs))
    except Error as error:
        details.append(error.message)
    return details or ["content"]


def _banner(side: Opened, section: ImageSection) -> str:
    side.file.seek(section.offset)
    try:
        return parse_kernel(side.file.read(min(READ_SIZE, section.size)), section.size)[1]
    except (FormatError, KernelError):
        return "unknown"


def _changed(what: str, ours: str, theirs: str) -> list[str]:
    return [f"{what} {ours}, then {theirs}"] if ours != theirs else []


def _metadata(ours: bytes, theirs: bytes) -> list[str]:
    """The keys whose values differ."""
    try:
        before, after = dict(_flat(json.loads(ours))), dict(_flat(json.loads(theirs)))
    except (ValueError, RecursionError):
        return ["content that is not JSON"]
    details = []
    for key in [*before, *(key for key in after if key not in before)]:
        was, now = (json.dumps(side[key])[:200] if key in side else "nothing" for side in (before, after))
        if was != now:
            details.append(f"{key} {was}, then {now}")
    return details[:MAX_SHOWN] or ["spacing or order of its JSON"]


def _flat(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _flat(below, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _signature(ours: bytes, theirs: bytes) -> list[str]:
    before, after = Signature.parse(ours), Signature.parse(theirs)
    if before.certificate.pcr8 != after.certificate.pcr8:
        return ["another certificate"]
    if before.pcr0 != after.pcr0:
        return ["the same certificate, over another PCR0"]
    return ["the same certificate; a signature is another each time it is made"]


def _shown(word: bytes) -> str:
    return word.decode("ascii", "backslashreplace")[:200]
