# SPDX-License-Identifier: Apache-2.0
"""Where a section's bytes come from: something of known size that is read once, in pieces, never held whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from enclavekit.errors import FileError

CHUNK_SIZE = 1 << 18
"""Large enough that hashing dominates, small enough to stay in a CPU's cache."""


class Content(Protocol):
    """Bytes to come. ``chunks`` gives exactly ``size`` bytes, the same each time; a chunk is never changed later."""

    @property
    def size(self) -> int:
        """In bytes."""

    def chunks(self) -> Iterator[bytes]:
        """The bytes in pieces; FileError when they cannot be had."""


@dataclass(frozen=True, slots=True)
class BytesContent:
    """Bytes in memory."""

    data: bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        """All of them at once."""
        yield self.data


@dataclass(frozen=True, slots=True)
class FileContent:
    """A range of an open file, which stays open and unchanged as long as this is used. ``name`` is for messages."""

    file: BinaryIO
    offset: int
    size: int
    name: str

    def chunks(self) -> Iterator[bytes]:
        """The range; FileError when the file has become shorter. The file's position stays as it is."""
        position, end = self.offset, self.offset + self.size
        descriptor = self.file.fileno()
        while position < end:
            try:
                chunk = os.pread(descriptor, min(CHUNK_SIZE, end - position), position)
            except OSError as error:
                raise FileError.of(error, self.name, "read") from error
            if not chunk:
                raise FileError(f"cannot read {self.name}: it ends at offset 0x{position:x}, expected 0x{end:x}")
            yield chunk
            position += len(chunk)
