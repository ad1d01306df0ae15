# SPDX-License-Identifier: Apache-2.0
"""Memory that a parent donates: the image in it is copied out, then the pages are taken away, and given back empty.

Only the image goes along. The enclave starts with zeroes around it: nothing that was not measured is there, nor what
the parent had in those pages before. The parent may write to them at any time, so what is looked at is the copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import BinaryIO

from enclavekit.eif.layout import HEADER_SIZE, SECTION_HEADER_SIZE, Header
from enclavekit.errors import TruncatedError
from enclavekit.lab.slots import DonatedRange
from enclavekit.linux.holes import punch
from enclavekit.platform.machine import IMAGE_LOAD_OFFSET

COPY_SIZE = 1 << 20


class Donated:
    """The ranges, in the order of donation, held open by descriptors of our own until ``close``."""

    def __init__(self, ranges: Sequence[DonatedRange]) -> None:
        with ExitStack() as stack:
            ours: dict[int, int] = {}
            for one in ranges:
                if one.fd not in ours:
                    ours[one.fd] = os.dup(one.fd)
                    stack.callback(os.close, ours[one.fd])
            self._pieces = [(ours[one.fd], one.offset, one.size) for one in ranges]
            self._cleanup = stack.pop_all()

    @property
    def size(self) -> int:
        """Bytes, of all together."""
        return sum(size for _, _, size in self._pieces)

    def image(self, stopped: Callable[[], bool]) -> BinaryIO:
        """A copy of the EIF at 8 MiB, as long as its header says; shorter when stopped meanwhile.

        Errors: ``EifError``, ``TruncatedError``, ``OSError``.
        """
        head = self._read(IMAGE_LOAD_OFFSET, HEADER_SIZE)
        header = Header.parse(head)
        ends = (at + SECTION_HEADER_SIZE + size for at, size in zip(header.offsets, header.sizes, strict=True))
        end, room = max(ends), self.size - IMAGE_LOAD_OFFSET
        if end > room:
            raise TruncatedError(f"EIF header: sections end at 0x{end:x}, the enclave's memory at 0x{room:x}")
        file = os.fdopen(os.memfd_create("enclave-image", os.MFD_CLOEXEC), "w+b")
        try:
            file.write(head)
            for place in range(HEADER_SIZE, end, COPY_SIZE):
                if stopped():
                    break
                file.write(self._read(IMAGE_LOAD_OFFSET + place, min(COPY_SIZE, end - place)))
            file.flush()
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    def empty(self) -> None:
        """Take the pages away; the parent has zeroed ones in their place. ``OSError``."""
        for fd, offset, size in self._pieces:
            punch(fd, offset, size)

    def close(self) -> None:
        """Hold them no more. Twice does no harm."""
        self._cleanup.close()

    def _read(self, place: int, count: int) -> bytes:
        """Of all together; less where it ends."""
        parts = []
        for fd, offset, size in self._pieces:
            if place < size and count:
                part = os.pread(fd, min(count, size - place), offset + place)
                parts.append(part)
                count -= len(part)
                place += len(part)
            place -= size
        return b"".join(parts)


def write_image(image: BinaryIO, memory: int) -> None:
    """Into enclave memory, at 8 MiB. ``OSError``."""
    place, end = 0, os.fstat(image.fileno()).st_size
    os.lseek(memory, IMAGE_LOAD_OFFSET, os.SEEK_SET)
    while place < end:
        place += os.sendfile(memory, image.fileno(), place, end - place)
