# SPDX-License-Identifier: Apache-2.0
"""One thread that waits for descriptors and calls what belongs to them; other threads hand it work."""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
Handler = Callable[[int], None]


class Loop:
    """Everything registered here is touched by the loop's thread only, but for ``call`` and ``stop``."""

    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, READ, self._woken)
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.on_error: Callable[[BaseException], None] | None = None
        """Told of an error that no handler caught, after which the loop has ended."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def watch(self, fd: Any, events: int, handler: Handler) -> None:  # noqa: ANN401 - fd or socket
        """Call ``handler`` with what is ready; no events: do not watch it any more."""
        known = fd in self._selector.get_map()
        if not events:
            if known:
                self._selector.unregister(fd)
        elif known:
            self._selector.modify(fd, events, handler)
        else:
            self._selector.register(fd, events, handler)

    def call(self, function: Callable[[], None]) -> None:
        """Have the loop's thread call it, soon. Safe from any thread."""
        self._calls.append(function)
        os.eventfd_write(self._wake, 1)

    def after(self, seconds: float, function: Callable[[], None]) -> None:
        """Call it later."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._count), function))

    def stop(self) -> None:
        """End the thread and wait for it. Safe from any other thread, and twice."""
        if self._thread.is_alive():
            self._stopping = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()

    def close(self) -> None:
        """After ``stop``: give the descriptors back."""
        self._selector.close()
        os.close(self._wake)

    def _woken(self, events: int) -> None:
        del events
        os.eventfd_read(self._wake)
        while self._calls:
            self._calls.popleft()()

    def _run(self) -> None:
        try:
            while not self._stopping:
                wait = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
                for key, events in self._selector.select(wait):
                    # An earlier handler of this round may have closed it.
                    if self._selector.get_map().get(key.fd) is key:
                        key.data(events)
                while self._timers and self._timers[0][0] <= time.monotonic():
                    heapq.heappop(self._timers)[2]()
        except BaseException as error:  # a thread's end must not go unnoticed
            if self.on_error is not None:
                self.on_error(error)
