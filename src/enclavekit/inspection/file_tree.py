# SPDX-License-Identifier: Apache-2.0
"""The files of a ramdisk as nested HTML lists: directories can be folded, and have the size of all below them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape

from enclavekit.image.initramfs import Ramdisk, RamdiskFile
from enclavekit.image.tree import shown

MAX_SHOWN_FILES = 20_000
"""On a page; the others are counted."""
MAX_LEVELS = 40
"""Of directories; a deeper path's rest is one name."""
MAX_NAME = 300
OPEN_LEVELS = 2

_KINDS = {
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass(slots=True)
class _Directory:
    """Also for a path whose directory has no entry of its own."""

    entries: dict[bytes, _Directory | RamdiskFile] = field(default_factory=dict)
    file: RamdiskFile | None = None
    size: int = 0
    count: int = 0
    left_out: int = 0


def file_tree(ramdisk: Ramdisk, room: int) -> Iterator[str]:
    """Nested lists of the ramdisk's files, in the order of their names; after ``room`` files they are only counted."""
    root = _Directory()
    for number, file in enumerate(ramdisk.files):
        _insert(root, file, hidden=number >= room)
    yield '<ul class="tree mono">\n'
    yield from _render(root, 0)
    yield "</ul>\n"


def _insert(root: _Directory, file: RamdiskFile, *, hidden: bool) -> None:
    parts = [part for part in file.entry.name.split(b"/") if part not in (b"", b".")]
    if len(parts) > MAX_LEVELS:
        parts = [*parts[: MAX_LEVELS - 1], b"/".join(parts[MAX_LEVELS - 1 :])]
    if not parts:
        return
    is_directory = stat.S_ISDIR(file.entry.mode)
    place = root
    for part in parts[:-1]:
        place.size += file.entry.size
        place.count += 1
        if hidden:
            break
        below = place.entries.get(part)
        if not isinstance(below, _Directory):
            below = _Directory()
            place.entries[part] = below
        place = below
    else:
        place.size += file.entry.size
        place.count += 1
    if hidden:
        place.left_out += 1
        return
    name = parts[-1]
    existing = place.entries.get(name)
    if is_directory and isinstance(existing, _Directory):
        existing.file = file
    else:
        place.entries[name] = _Directory(file=file) if is_directory else file


def _render(directory: _Directory, level: int) -> Iterator[str]:
    for name, one in sorted(directory.entries.items()):
        if isinstance(one, RamdiskFile):
            yield f'<li class="leaf">{_row(_label(name, one), _attributes(one), _about(one))}</li>\n'
        elif not one.entries and not one.left_out:
            yield f'<li class="leaf">{_row(_name(name) + "/", _attributes(one.file), "")}</li>\n'
        else:
            opened = " open" if level < OPEN_LEVELS else ""
            about = f"{one.count} file{'s' if one.count > 1 else ''}, {_size(one.size)}"
            row = _row(_name(name) + "/", _attributes(one.file), about)
            yield f"<li><details{opened}><summary>{row}</summary>\n<ul>\n"
            yield from _render(one, level + 1)
            yield "</ul>\n</details></li>\n"
    if directory.left_out:
        yield f'<li class="leaf">and {directory.left_out} files more</li>\n'


def _row(label: str, attributes: str, about: str) -> str:
    return (
        f'<span class="row"><span class="name">{label}</span><span class="about">{attributes}</span>'
        f'<span class="about size">{about}</span></span>'
    )


def _label(name: bytes, file: RamdiskFile) -> str:
    if stat.S_ISLNK(file.entry.mode) and file.entry.size <= MAX_NAME:
        return f"{_name(name)} → {_name(b''.join(file.content.chunks()))}"
    return _name(name)


def _about(file: RamdiskFile) -> str:
    kind = stat.S_IFMT(file.entry.mode)
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        return f"{_KINDS[kind]} {file.entry.rdev[0]}:{file.entry.rdev[1]}"
    if kind in _KINDS:
        return _KINDS[kind]
    return "symlink" if stat.S_ISLNK(kind) else _size(file.entry.size)


def _attributes(file: RamdiskFile | None) -> str:
    if file is None:
        return ""
    return f"{file.entry.mode & 0o7777:04o} {file.entry.uid}:{file.entry.gid}"


def _name(name: bytes) -> str:
    text = shown(name)
    return escape(text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}…")


def _size(size: int) -> str:
    return f"{size:,}".replace(",", " ")
