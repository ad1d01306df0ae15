# SPDX-License-Identifier: Apache-2.0
"""Memory that a parent donates: copied to memory that it does not see, taken away from it, and given back empty.

The parent may write to its pages at any time, so what is checked, measured and booted is the copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import BinaryIO

from enclavekit.eif.layout import HEADER_SIZE, SECTION_HEADER_SIZE, Header
from enclavekit.errors import LaunchError, TruncatedError
from enclavekit.lab.slots import DonatedRange
from enclavekit.linux.holes import data_ranges, punch
from enclavekit.platform.machine import IMAGE_LOAD_OFFSET

COPY_SIZE = 2 << 20
"""A huge page of the parent's: most of them are empty as a whole."""


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

    def copy_to(self, memory: int, stopped: Callable[[], bool]) -> None:
        """Into a file of as many zeroes, one after the other; what is zero stays a hole. Ends early when stopped."""
        buffer = bytearray(COPY_SIZE)
        view, zeroes = memoryview(buffer), bytes(COPY_SIZE)
        base = 0
        for fd, offset, size in self._pieces:
            for place, end in data_ranges(fd, offset, offset + size):
                while place < end:
                    if stopped():
                        return
                    count = os.preadv(fd, [view[: min(COPY_SIZE, end - place)]], place)
                    if not count:
                        raise LaunchError("donated memory: the parent's memory ends before it")
                    if buffer[:count] != zeroes[:count]:
                        write_all(memory, view[:count], base + place - offset)
                    place += count  # noqa: PLW2901 - a range is used up
            base += size

    def empty(self) -> None:
        """Take the pages away; the parent has zeroed ones in their place."""
        for fd, offset, size in self._pieces:
            punch(fd, offset, size)

    def close(self) -> None:
        """Hold them no more. Twice does no harm."""
        self._cleanup.close()


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """``pwrite`` until all is written."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def image_in(memory: int) -> BinaryIO:
    """The EIF that lies at 8 MiB of enclave memory, as a file of its own, without what is behind it.

    Only its header is looked at. Errors: ``EifError``, ``TruncatedError``.
    """
    size = os.fstat(memory).st_size - IMAGE_LOAD_OFFSET
    header = Header.parse(os.pread(memory, HEADER_SIZE, IMAGE_LOAD_OFFSET))
    end = max(start + SECTION_HEADER_SIZE + length for start, length in zip(header.offsets, header.sizes, strict=True))
    if end > size:
        raise TruncatedError(f"EIF header: sections end at 0x{end:x}, the enclave's memory at 0x{size:x}")
    file = os.fdopen(os.memfd_create("enclave-image", os.MFD_CLOEXEC), "w+b", buffering=0)
    try:
        place = 0
        while place < end:
            sent = os.sendfile(file.fileno(), memory, IMAGE_LOAD_OFFSET + place, end - place)
            if not sent:
                raise TruncatedError(f"image ends at offset 0x{place:x}, expected 0x{end:x}")
            place += sent
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file
