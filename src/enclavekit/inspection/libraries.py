# SPDX-License-Identifier: Apache-2.0
"""Whether a dynamic loader, glibc's or musl's, finds all libraries that a program of an image needs.

Source: ld.so(8) and glibc elf/dl-load.c; musl ldso/dynlink.c. ``ld.so.cache`` is not read: the directories of
``ld.so.conf``, of which ldconfig makes it, are searched instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from enclavekit.codec.elf import Elf
from enclavekit.eif import Arch
from enclavekit.errors import FormatError
from enclavekit.inspection.file_system import CoveredError, Node, PathError, shown
from enclavekit.inspection.process import MAX_DIRECTORIES, Problem, Process

MAX_LIBRARIES = 1024
MAX_LOOKUPS = 20_000
"""For all libraries together. A program with hundreds of them needs some thousands; past it no more is found out."""
MAX_CONFIGURATION_SIZE = 1 << 16
MAX_CONFIGURATION_FILES = 64

_TRIPLETS = {Arch.X86_64: b"x86_64-linux-gnu", Arch.AARCH64: b"aarch64-linux-gnu"}
_MUSL_DIRECTORIES = b"/lib:/usr/local/lib:/usr/lib"
_MUSL_OWN = (b"libc.so", b"libpthread.so", b"librt.so", b"libm.so", b"libdl.so", b"libutil.so", b"libxnet.so")
"""musl's loader is all of these, whatever follows in their names."""


def missing_libraries(process: Process, interpreter: bytes, path: bytes, node: Node, elf: Elf) -> Iterator[Problem]:
    """Of the program at ``path``, whose dynamic loader is ``interpreter``; a problem for each."""
    yield from _Loader(process, interpreter).load(_Loaded(path, node.parent, elf, None))


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A program or library, the directory it lies in, and who asked for it."""

    path: bytes
    origin: Node
    elf: Elf
    by: _Loaded | None


class _Loader:
    """Finds libraries as the dynamic loader does, breadth first, each name once."""

    def __init__(self, process: Process, interpreter: bytes) -> None:
        self._process = process
        self._lookups = 0
        self._parsed: dict[int, Elf | None] = {}
        self._name = interpreter.rpartition(b"/")[2]
        self._is_musl = self._name.startswith(b"ld-musl-")
        self._from_environment = _paths(process.environment.get(b"LD_LIBRARY_PATH", b""))
        self._system = self._musl_directories(interpreter) if self._is_musl else self._glibc_directories()

    def load(self, program: _Loaded) -> Iterator[Problem]:
        """The libraries that are missing."""
        queue = deque([program])
        names = {self._name}
        while queue:
            loaded = queue.popleft()
            for name in loaded.elf.needed:
                if name in names or (self._is_musl and name.startswith(_MUSL_OWN)):
                    continue
                names.add(name)
                try:
                    found = self._find(name, loaded)
                except CoveredError:
                    continue
                if len(names) > MAX_LIBRARIES or self._lookups > MAX_LOOKUPS:
                    return
                if found is None:
                    yield Problem("library", f"{shown(name)}, which {shown(loaded.path)} needs: in no directory")
                else:
                    queue.append(found)

    def _find(self, name: bytes, by: _Loaded) -> _Loaded | None:
        if b"/" in name:
            directory, _, base = name.rpartition(b"/")
            return self._in(directory or b"/", base, by.origin, by)
        for directory, origin in self._search(by):
            if self._lookups > MAX_LOOKUPS:
                break
            found = self._in(directory, name, origin, by)
            if found:
                return found
        return None

    def _search(self, by: _Loaded) -> Iterator[tuple[bytes, Node]]:
        """Directories in their order, each with what $ORIGIN is in it."""
        if self._is_musl:
            yield from ((path, by.origin) for path in self._from_environment)
            one: _Loaded | None = by
            while one:
                paths = _paths(one.elf.runpath if one.elf.runpath is not None else one.elf.rpath or b"")
                yield from ((path, one.origin) for path in paths)
                one = one.by
        else:
            one = by if by.elf.runpath is None else None
            while one:
                if one.elf.runpath is None:
                    yield from ((path, one.origin) for path in _paths(one.elf.rpath or b""))
                one = one.by
            yield from ((path, by.origin) for path in self._from_environment)
            yield from ((path, by.origin) for path in _paths(by.elf.runpath or b""))
        yield from ((path, by.origin) for path in self._system)

    def _in(self, directory: bytes, name: bytes, origin: Node, by: _Loaded) -> _Loaded | None:
        """The library in that directory, if it is one that the loader would take."""
        start = None
        for word in (b"$ORIGIN", b"${ORIGIN}"):
            if directory.startswith(word):
                directory, start = b"." + directory[len(word) :], origin
        for one in self._expanded(directory):
            self._lookups += 1
            try:
                folder = self._process.find(one, start)
                elf = self._parse(self._process.find(name, folder))
            except CoveredError:
                raise
            except PathError:
                continue
            if elf and elf.machine == by.elf.machine and elf.bits == by.elf.bits:
                return _Loaded(one.rstrip(b"/") + b"/" + name, folder, elf, by)
        return None

    def _parse(self, node: Node) -> Elf | None:
        if id(node) not in self._parsed:
            try:
                self._parsed[id(node)] = Elf.parse(node.read_at)
            except FormatError:
                self._parsed[id(node)] = None
        return self._parsed[id(node)]

    def _expanded(self, directory: bytes) -> Sequence[bytes]:
        libs = (b"lib64", b"lib", b"lib/" + _TRIPLETS[self._process.arch])
        made = [directory.replace(b"${PLATFORM}", b"$PLATFORM").replace(b"$PLATFORM", str(self._process.arch).encode())]
        if b"$LIB" in directory or b"${LIB}" in directory:
            made = [one.replace(b"${LIB}", b"$LIB").replace(b"$LIB", lib) for one in made for lib in libs]
        return made

    def _musl_directories(self, interpreter: bytes) -> list[bytes]:
        """Those of the file that belongs to the loader, /etc/ld-musl-ARCH.path beside its own lib."""
        prefix = interpreter.rpartition(b"/")[0].rpartition(b"/")[0]
        name = self._name.partition(b".so")[0]
        text = self._read(prefix + b"/etc/" + name + b".path")
        return _paths(_MUSL_DIRECTORIES if text is None else text.replace(b"\n", b":"))

    def _glibc_directories(self) -> list[bytes]:
        triplet = _TRIPLETS[self._process.arch]
        own = [b"/lib/" + triplet, b"/usr/lib/" + triplet, b"/lib64", b"/usr/lib64", b"/lib", b"/usr/lib"]
        return [*own, *self._configured()][:MAX_DIRECTORIES]

    def _configured(self) -> Iterator[bytes]:
        """The directories of ld.so.conf, and of the files that it includes."""
        files = deque([b"/etc/ld.so.conf"])
        for _ in range(MAX_CONFIGURATION_FILES):
            if not files:
                return
            for line in (self._read(files.popleft()) or b"").splitlines():
                words = line.partition(b"#")[0].split()
                if words[:1] == [b"include"]:
                    for pattern in words[1:]:
                        files.extend(self._matching(pattern))
                elif words and words[0] != b"hwcap":
                    yield words[0].rstrip(b",").partition(b"=")[0]

    def _matching(self, pattern: bytes) -> list[bytes]:
        """A pattern as distributions have it: one * in the last name."""
        if not pattern.startswith(b"/"):
            pattern = b"/etc/" + pattern
        directory, _, last = pattern.rpartition(b"/")
        before, star, after = last.partition(b"*")
        if not star:
            return [pattern]
        try:
            children = self._process.find(directory or b"/").children or {}
        except PathError:
            return []
        names = (name for name in children if name.startswith(before) and name.endswith(after))
        return [directory + b"/" + name for name in sorted(names)][:MAX_CONFIGURATION_FILES]

    def _read(self, path: bytes) -> bytes | None:
        try:
            return self._process.find(path).read_at(0, MAX_CONFIGURATION_SIZE)
        except PathError:
            return None


def _paths(text: bytes) -> list[bytes]:
    """Directories separated by colons; glibc takes semicolons too, and an empty one is the working directory."""
    return [part or b"." for part in text.replace(b";", b":").split(b":")][:MAX_DIRECTORIES] if text else []
