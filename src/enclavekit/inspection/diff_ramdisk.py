# SPDX-License-Identifier: Apache-2.0
"""What differs between two ramdisks: files that one of them lacks, and of the others content, type, mode, owner, time.

A file's name is its path; one that is there several times is paired by its turn. What is left when all files are the
same: their order, the numbers of their inodes, how they are compressed, and the padding.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from enclavekit.eif import FileContent
from enclavekit.image.initramfs import Archive, Ramdisk, RamdiskFile
from enclavekit.image.tree import shown
from enclavekit.inspection.compare import same, touches

MAX_RECORDS = 20
MAX_RECORDS_SIZE = 1 << 20
_RECORD_FILES = (b"config", b"cmd", b"env")
"""What init runs, ours or AWS's: of these it is said which lines are new."""

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}

Key = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class FileDifference:
    """A file of a ramdisk. ``changes`` are words: added, removed, content, type, mode, owner, mtime, links, device.

    ``details`` has sentences for them.
    """

    path: str
    changes: tuple[str, ...]
    details: tuple[str, ...] = ()


def compare_ramdisks(
    one: Ramdisk, other: Ramdisk, blocks: list[int] | None, ours: FileContent, theirs: FileContent
) -> tuple[list[str], list[FileDifference]]:
    """Details of the whole, and the files that differ.

    ``blocks`` of the sections differ, so files outside of them, at the same place, are not read again; None: not known.
    """
    sizes = [f"{ours.size} bytes, then {theirs.size}"] if ours.size != theirs.size else []
    reasons = []
    for name, ramdisk in ((ours.name, one), (theirs.name, other)):
        if ramdisk.trouble:
            reasons.append(f"{name}: {ramdisk.trouble.message}; what is behind it was not compared by file")
    compressions = [[archive.compression for archive in ramdisk.archives] for ramdisk in (one, other)]
    if compressions[0] != compressions[1]:
        words = [", ".join(kind or "not compressed" for kind in kinds) for kinds in compressions]
        reasons.append(f"compression: {words[0]}; then {words[1]}")
    before, after = _keyed(one), _keyed(other)
    files = []
    for key, (archive, file) in before.items():
        if key not in after:
            files.append(FileDifference(shown(key[0]), ("removed",), (_described(file),)))
            continue
        other_archive, counterpart = after[key]
        known = blocks if archive.compression is None and other_archive.compression is None else None
        found = _compare(file, counterpart, known, ours.offset)
        if found:
            files.append(found)
    files += [
        FileDifference(shown(key[0]), ("added",), (_described(file),))
        for key, (_, file) in after.items()
        if key not in before
    ]
    reasons += _order(list(before), list(after))
    if not files and not reasons:
        inodes = [[(file.entry.ino, file.entry.dev) for file in ramdisk.files] for ramdisk in (one, other)]
        what = "inode numbers" if inodes[0] != inodes[1] else "padding, or how the same headers are written"
        compressed = any(kind for kinds in compressions for kind in kinds)
        reasons.append("how the same files are compressed" if compressed else what)
    return [*sizes, *reasons], files


def _keyed(ramdisk: Ramdisk) -> dict[Key, tuple[Archive, RamdiskFile]]:
    keyed: dict[Key, tuple[Archive, RamdiskFile]] = {}
    turns: dict[bytes, int] = {}
    for archive in ramdisk.archives:
        for file in archive.files:
            path = file.entry.name.strip(b"/")
            turn = turns.get(path, 0)
            turns[path] = turn + 1
            keyed[path, turn] = archive, file
    return keyed


def _compare(one: RamdiskFile, other: RamdiskFile, blocks: list[int] | None, base: int) -> FileDifference | None:
    """``base`` is where the ramdisk starts in the file that its blocks are counted in."""
    ours, theirs = one.entry, other.entry
    found = dict(_attributes(one, other))
    if ours.size != theirs.size:
        found["content"] = f"{ours.size} bytes, then {theirs.size}"
    elif ours.size:
        start = one.content.offset - base
        moved = one.offset != other.offset
        if (moved or blocks is None or touches(blocks, start, start + ours.size)) and not same(
            one.content, other.content
        ):
            found["content"] = f"{ours.size} bytes, others than before"
    if "content" in found and ours.name.strip(b"/") in _RECORD_FILES:
        found["content"] += "".join(f"; {line}" for line in _records(one.content, other.content))
    if not found:
        return None
    return FileDifference(shown(ours.name.strip(b"/")), tuple(found), tuple(f"{k}: {v}" for k, v in found.items()))


def _attributes(one: RamdiskFile, other: RamdiskFile) -> Iterator[tuple[str, str]]:
    ours, theirs = one.entry, other.entry
    kinds = [_KINDS.get(stat.S_IFMT(entry.mode), "unknown kind") for entry in (ours, theirs)]
    if kinds[0] != kinds[1]:
        yield "type", f"{kinds[0]}, then {kinds[1]}"
    if ours.mode & 0o7777 != theirs.mode & 0o7777:
        yield "mode", f"{ours.mode & 0o7777:04o}, then {theirs.mode & 0o7777:04o}"
    if (ours.uid, ours.gid) != (theirs.uid, theirs.gid):
        yield "owner", f"{ours.uid}:{ours.gid}, then {theirs.uid}:{theirs.gid}"
    if ours.mtime != theirs.mtime:
        times = [f"{datetime.fromtimestamp(entry.mtime, UTC):%Y-%m-%d %H:%M:%S}" for entry in (ours, theirs)]
        yield "mtime", f"{times[0]}, then {times[1]}"
    if ours.nlink != theirs.nlink:
        yield "links", f"{ours.nlink}, then {theirs.nlink}"
    if ours.rdev != theirs.rdev:
        yield "device", f"{ours.rdev[0]}:{ours.rdev[1]}, then {theirs.rdev[0]}:{theirs.rdev[1]}"


def _order(before: list[Key], after: list[Key]) -> list[str]:
    """Whether files that both have stand in another order."""
    here, there = set(before), set(after)
    ours = [key for key in before if key in there]
    theirs = [key for key in after if key in here]
    for one, other in zip(ours, theirs, strict=True):
        if one != other:
            return [f"order of files: {shown(one[0])}, then {shown(other[0])} in its place"]
    return []


def _records(one: FileContent, other: FileContent) -> list[str]:
    if max(one.size, other.size) > MAX_RECORDS_SIZE:
        return []
    before, after = (b"".join(side.chunks()).replace(b"\0", b"\n").splitlines() for side in (one, other))
    lines = [f"without {shown(line)[:200]}" for line in sorted(set(before) - set(after))]
    lines += [f"with {shown(line)[:200]}" for line in sorted(set(after) - set(before))]
    return lines[:MAX_RECORDS]


def _described(file: RamdiskFile) -> str:
    kind = _KINDS.get(stat.S_IFMT(file.entry.mode), "unknown kind")
    return f"{kind}, {file.entry.size} bytes" if kind == "file" else kind
