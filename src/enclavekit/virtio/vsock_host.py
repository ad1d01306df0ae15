# SPDX-License-Identifier: Apache-2.0
"""What a vsock device needs of the host: byte streams, routes to them, timers. None of them blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Protocol

from enclavekit.virtio.vsock_packet import Address


class Stream(Protocol):
    """The host's end of a connection."""

    def attach(self, on_event: Callable[[int], None]) -> None:
        """Report EPOLLIN, EPOLLRDHUP and EPOLLHUP from now on, each when it comes up (edges).

        EPOLLOUT too, when there is room again after a ``send`` that did not take all.
        """

    def receive(self, buffers: Sequence[memoryview]) -> int | None:
        """Fill buffers; 0 at the end, None when there is nothing now."""

    def send(self, buffers: Sequence[memoryview | bytearray]) -> int:
        """Take as much as goes now; ``OSError`` when nobody will ever take it."""

    def end(self) -> None:
        """Nothing more will be sent."""

    def refuse(self) -> None:
        """Nothing more will be received."""

    def close(self) -> None:
        """Done with it."""


class Pending:
    """A stream to somebody who has not said yet whether he takes it. All of it happens in the device's thread."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._on_answer: Callable[[bool], None] | None = None

    def then(self, on_answer: Callable[[bool], None]) -> None:
        """Who wants to know. Before the answer."""
        self._on_answer = on_answer

    def answer(self, accepted: bool) -> None:
        """Once. The stream is closed by its device, also where it was not accepted."""
        if self._on_answer is not None:
            self._on_answer(accepted)


class Route(Protocol):
    """Whoever lives at a CID."""

    def dial(self, source: Address, port: int) -> Stream | Pending | None:
        """The guest's port ``source`` wants ``port``; None refuses."""


class Timer(Protocol):
    """Something that will happen."""

    def cancel(self) -> None:
        """It will not."""


class Outcome(Enum):
    """What became of a connection that the host asked for."""

    ACCEPTED = auto()
    REFUSED = auto()
    TIMED_OUT = auto()
    ENDED = auto()
    """The guest was reset or is gone."""
