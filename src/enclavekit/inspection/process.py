# SPDX-License-Identifier: Apache-2.0
"""Who executes a file of an image, and what stands in the way of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from enclavekit.eif import Arch
from enclavekit.inspection.file_system import Node, PathError, find

MAX_DIRECTORIES = 256
"""Of a search path."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file cannot be executed. ``kind`` is the last part of a rule's code, as in program-library."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Process:
    """Who executes: with which root and working directory, as which user, with which environment."""

    root: Node
    arch: Arch
    start: Node | None = None
    covered: frozenset[bytes] = frozenset()
    environment: Mapping[bytes, bytes] = field(default_factory=dict)
    uid: int = 0
    groups: frozenset[int] = frozenset()

    def find(self, path: bytes, start: Node | None = None) -> Node:
        """What the path leads to; PathError."""
        return find(self.root, path, start=start or self.start, covered=self.covered)


def look_up(process: Process, name: bytes, directories: bytes) -> bytes | None:
    """The path at which execvp finds a program: as it is when it has a slash, else in the directories of a PATH."""
    if b"/" in name:
        return name
    for directory in directories.split(b":")[:MAX_DIRECTORIES]:
        path = (directory or b".").rstrip(b"/") + b"/" + name
        try:
            node = process.find(path)
        except PathError:
            continue
        if node.is_file and node.may_execute(process.uid, process.groups):
            return path
    return None
