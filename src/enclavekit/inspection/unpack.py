# SPDX-License-Identifier: Apache-2.0
"""Unpacks a ramdisk's files below a directory, and never outside it, whatever their names and symlinks say.

Every directory on a path is opened from the one above it, without following symlinks; a symlink on the way is resolved
by hand, its root being the directory that everything is unpacked to, as in the enclave.

Source: linux init/initramfs.c for what later entries do to earlier ones, and for hard links.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from enclavekit.errors import FileError, FormatError
from enclavekit.image.initramfs import Ramdisk, RamdiskFile
from enclavekit.image.tree import MAX_DEPTH, normalise, shown

MAX_SYMLINKS = 40
MAX_TARGET = 4095

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class Unpacked:
    """What was done: files made, and what was left out, by kind."""

    files: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


def unpack(ramdisk: Ramdisk, directory: Path, *, devices: bool = False, owners: bool = False) -> Unpacked:
    """Make the ramdisk's files in an empty directory.

    They belong to whoever calls this, without set-user-id bits; ``owners`` gives them their owners and all of their
    modes, ``devices`` makes device nodes, and both need root. Sockets are left out. FormatError or SourceError for
    names that cannot be, FileError when the system refuses; files may be left then.
    """
    with _opened(os.open(directory, _DIRECTORY)) as root:
        return _Unpacker(root, devices, owners).unpack(ramdisk)


class _Unpacker:
    def __init__(self, root: int, devices: bool, owners: bool) -> None:
        self._root = root
        self._devices = devices
        self._owners = owners
        self._directories: dict[bytes, RamdiskFile] = {}
        self._done = Unpacked()

    def unpack(self, ramdisk: Ramdisk) -> Unpacked:
        for archive in ramdisk.archives:
            links: dict[tuple[int, tuple[int, int], int], bytes] = {}
            for file in archive.files:
                path = normalise(file.entry.name)
                try:
                    self._make(path, file, links)
                except OSError as error:
                    raise FileError.of(error, shown(path), "unpack") from error
        # Last, and from the inside out: a directory that may not be written to, and its time, which files change.
        for path in sorted(self._directories, reverse=True):
            try:
                with self._parent(path) as (parent, name):
                    self._attributes(parent, name, self._directories[path])
            except OSError as error:
                raise FileError.of(error, shown(path), "unpack") from error
        return self._done

    def _make(self, path: bytes, file: RamdiskFile, links: dict[tuple[int, tuple[int, int], int], bytes]) -> None:
        entry, kind = file.entry, stat.S_IFMT(file.entry.mode)
        if not path:  # the root directory itself, as "." or "/"
            return
        with self._parent(path) as (parent, name):
            if kind == stat.S_IFDIR:
                self._make_directory(parent, name)
                self._directories[path] = file
            else:
                self._clear(parent, name)
                self._directories.pop(path, None)
                if not self._make_other(parent, name, file, path, links):
                    return
                self._attributes(parent, name, file)
        self._done.files += 1
        if entry.nlink > 1 and kind == stat.S_IFREG:
            links.setdefault((entry.ino, entry.dev, kind), path)

    def _make_other(
        self,
        parent: int,
        name: bytes,
        file: RamdiskFile,
        path: bytes,
        links: dict[tuple[int, tuple[int, int], int], bytes],
    ) -> bool:
        entry, kind = file.entry, stat.S_IFMT(file.entry.mode)
        match kind:
            case stat.S_IFREG:
                first = links.get((entry.ino, entry.dev, kind)) if entry.nlink > 1 else None
                linked = first is not None and self._link(first, parent, name)
                if not linked or entry.size:
                    self._write(parent, name, file)
            case stat.S_IFLNK:
                if entry.size > MAX_TARGET:
                    raise FormatError(f"{shown(path)}: a symlink of {entry.size} bytes, expected at most {MAX_TARGET}")
                os.symlink(b"".join(file.content.chunks()), name, dir_fd=parent)
            case stat.S_IFIFO:
                os.mkfifo(name, 0o600, dir_fd=parent)
            case stat.S_IFCHR | stat.S_IFBLK if self._devices:
                os.mknod(name, kind | 0o600, os.makedev(*entry.rdev), dir_fd=parent)
            case _:
                names = {stat.S_IFCHR: "character device", stat.S_IFBLK: "block device", stat.S_IFSOCK: "socket"}
                what = names.get(kind, "unknown kind")
                self._done.left_out[what] = self._done.left_out.get(what, 0) + 1
                return False
        return True

    def _link(self, first: bytes, parent: int, name: bytes) -> bool:
        """False where the first of its names is by now something else: a symlink or a pipe is not to be written to."""
        with self._parent(first) as (first_parent, first_name):
            found = _lstat(first_parent, first_name)
            if found is None or not stat.S_ISREG(found.st_mode):
                return False
            os.link(first_name, name, src_dir_fd=first_parent, dst_dir_fd=parent, follow_symlinks=False)
            return True

    def _write(self, parent: int, name: bytes, file: RamdiskFile) -> None:
        if _lstat(parent, name):  # a hard link, whose mode may forbid it
            _chmod(parent, name, 0o600)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, 0o600, dir_fd=parent), "wb", buffering=0) as out:
            for chunk in file.content.chunks():
                left = memoryview(chunk)
                while left:
                    left = left[out.write(left) :]

    def _make_directory(self, parent: int, name: bytes) -> None:
        found = _lstat(parent, name)
        if found and not stat.S_ISDIR(found.st_mode):
            os.unlink(name, dir_fd=parent)
            found = None
        if not found:
            os.mkdir(name, 0o700, dir_fd=parent)

    def _clear(self, parent: int, name: bytes) -> None:
        """A later entry replaces an earlier one, but no directory that has something in it."""
        found = _lstat(parent, name)
        if found and stat.S_ISDIR(found.st_mode):
            os.rmdir(name, dir_fd=parent)
        elif found:
            os.unlink(name, dir_fd=parent)

    def _attributes(self, parent: int, name: bytes, file: RamdiskFile) -> None:
        entry = file.entry
        if self._owners:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISLNK(entry.mode):
            _chmod(parent, name, entry.mode & (0o7777 if self._owners else 0o777))
        os.utime(name, (entry.mtime, entry.mtime), dir_fd=parent, follow_symlinks=False)

    @contextmanager
    def _parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """The directory that a path lies in, open, and the path's last part. Missing directories are made."""
        *above, name = path.split(b"/")
        with _opened(os.dup(self._root)) as descriptor:
            place: list[tuple[bytes, int]] = []
            try:
                self._descend(above, place, path)
                yield (place[-1][1] if place else descriptor), name
            finally:
                for _, opened in place:
                    os.close(opened)

    def _descend(self, above: list[bytes], place: list[tuple[bytes, int]], path: bytes) -> None:
        """Open one directory after another, into ``place``."""
        parts = list(reversed(above))
        symlinks = 0
        while parts:
            part = parts.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if place:
                    os.close(place.pop()[1])
                continue
            if len(place) >= MAX_DEPTH:
                raise FormatError(f"{shown(path)}: more than {MAX_DEPTH} directories deep")
            here = place[-1][1] if place else self._root
            found = _lstat(here, part)
            if found and stat.S_ISLNK(found.st_mode):
                symlinks += 1
                if symlinks > MAX_SYMLINKS:
                    raise FormatError(f"{shown(path)}: more than {MAX_SYMLINKS} symlinks on the way")
                target = os.readlink(part, dir_fd=here)
                if target.startswith(b"/"):
                    while place:
                        os.close(place.pop()[1])
                parts += reversed(target.split(b"/"))
                continue
            if not found:
                os.mkdir(part, 0o755, dir_fd=here)
            elif not stat.S_ISDIR(found.st_mode):
                raise FormatError(f"{shown(path)}: lies in {shown(part)}, which is no directory")
            place.append((part, os.open(part, _DIRECTORY, dir_fd=here)))


def _chmod(parent: int, name: bytes, mode: int) -> None:
    """Not of what a symlink leads to: one may have come into a directory's place by another name of that."""
    with _opened(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)) as found:
        if not stat.S_ISLNK(os.fstat(found).st_mode):
            Path(f"/proc/self/fd/{found}").chmod(mode)


def _lstat(parent: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


@contextmanager
def _opened(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
