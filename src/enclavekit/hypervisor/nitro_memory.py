# SPDX-License-Identifier: Apache-2.0
"""Which huge pages an enclave's memory is made of.

nitro-cli takes the largest pages first and then, for what is missing, any page, the smallest first; so 256 MiB may cost
a whole page of 1 GiB. The tight choice, ours, never takes a page larger than what is still missing, but one of the
smallest size at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol, TypeVar

from enclavekit.errors import NotEnoughHugePagesError


class Buffer(Protocol):
    """A mapped page."""

    def __len__(self) -> int:
        """In bytes."""

    def close(self) -> None:
        """Give it back."""


B = TypeVar("B", bound=Buffer)


class PageChoice(StrEnum):
    """How pages are chosen."""

    TIGHT = "tight"
    NITRO_CLI = "nitro-cli"


def allocate(size: int, sizes: Sequence[int], map_page: Callable[[int], B], choice: PageChoice) -> list[B]:
    """Pages of at least ``size`` bytes in all, the largest first; ``sizes`` are those of the machine, in bytes.

    ``map_page`` raises ``OSError`` when there is none of that size. Errors: ``NotEnoughHugePagesError``, and
    no page is kept.
    """
    pages: list[B] = []
    missing = size

    def take(page_size: int) -> bool:
        nonlocal missing
        try:
            page = map_page(page_size)
        except OSError:
            return False
        pages.append(page)
        missing -= page_size
        return True

    try:
        for page_size in sorted(sizes, reverse=True):
            while page_size <= missing and take(page_size):
                pass
        for page_size in sorted(sizes)[: 1 if choice is PageChoice.TIGHT else None]:
            while missing > 0 and take(page_size):
                pass
        if missing > 0:
            raise NotEnoughHugePagesError(
                f"memory: {size >> 20} MiB of huge pages were asked for, {(size - missing) >> 20} MiB could be had",
                hint="reserve more: enclave allocate, best early after boot; or end another enclave",
            )
    except BaseException:
        for page in pages:
            page.close()
        raise
    pages.sort(key=len, reverse=True)
    while pages and sum(map(len, pages[:-1])) >= size:
        pages.pop().close()
    return pages
