# SPDX-License-Identifier: Apache-2.0
"""One thread that waits on files (epoll(7), edges) and timers, and does a device's work in between.

An exception that nobody caught ends the loop: it is kept in ``error``, and ``on_end`` closes everything, so that a
failure is seen outside and not waited for.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

MAX_EVENTS = 64
"""That are dealt with before ``work``."""

LOOK_S = 500e-6
"""How long to look for what is expected. An emulated guest's answer takes a fifth to a half of it."""
MAX_BLIND = 63
"""Expectations that are not looked for after many that were disappointed: little time is lost where none come true."""


class LoopTimer:
    """A call in the future."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Do not call."""
        self._call = None

    @property
    def live(self) -> bool:
        """Neither cancelled nor over."""
        return self._call is not None

    def fire(self) -> None:
        """Call, once."""
        call, self._call = self._call, None
        if call is not None:
            call()


class Loop:
    """``work`` follows every batch of events and is repeated while it returns True.

    ``peek`` says whether there is work that no event tells of; from then on until ``work`` none has to.
    ``on_end`` is the last call with files to watch; ``on_closed`` comes when the loop itself has none open any more.
    ``watch``, ``change``, ``forget``, ``retire`` and ``call_later`` are for the loop's own thread, or before it starts.
    """

    def __init__(
        self,
        work: Callable[[], bool],
        on_end: Callable[[], None],
        on_closed: Callable[[], None] = lambda: None,
        peek: Callable[[], bool] = lambda: False,
    ) -> None:
        self._work = work
        self._peek = peek
        self._on_end = on_end
        self._on_closed = on_closed
        self.error: BaseException | None = None
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._callbacks: dict[int, Callable[[int], None] | None] = {self._wake: self._woken}
        self._retired: list[socket.socket] = []
        self._timers: list[tuple[float, int, LoopTimer]] = []
        self._sequence = itertools.count()
        self._calls: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._ended = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._look_until = 0.0
        """While something is expected."""
        self._blind = self._blind_left = 0
        """How many expectations there are to be without a look: twice as many after each that was disappointed."""

    def watch(self, fd: int, callback: Callable[[int], None] | None, events: int = select.EPOLLIN) -> None:
        """Call back with the events that came up, from now on; None: to be woken is enough."""
        self._epoll.register(fd, events | select.EPOLLET)
        self._callbacks[fd] = callback

    def change(self, fd: int, events: int) -> None:
        """Watch for other events; those that are up already come at once."""
        if fd in self._callbacks:
            self._epoll.modify(fd, events | select.EPOLLET)

    def forget(self, fd: int) -> None:
        """Stop watching, before the fd is closed."""
        if fd in self._callbacks:
            del self._callbacks[fd]
            self._epoll.unregister(fd)

    def retire(self, sock: socket.socket) -> None:
        """Forget and close; its number is not used again before the events at hand are dealt with."""
        self.forget(sock.fileno())
        self._retired.append(sock)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> LoopTimer:
        """Call once, after a while."""
        timer = LoopTimer(call)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._sequence), timer))
        return timer

    def call(self, call: Callable[[], None]) -> bool:
        """From any thread: call soon in the loop's. False once the loop has ended."""
        with self._lock:
            if self._ended:
                return False
            self._calls.append(call)
            os.eventfd_write(self._wake, 1)
            return True

    def expect(self) -> None:
        """From ``work``: what was done is likely to be answered soon, and then expected again."""
        if self._blind_left:
            self._blind_left -= 1
            return
        if self._look_until:
            self._blind = 0  # the last one came true
        self._look_until = time.monotonic() + LOOK_S

    def start(self, name: str) -> None:
        """In a thread of its own, from now until ``stop`` or an error. ``RuntimeError`` where there can be none."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None
            raise

    def stop(self) -> None:
        """End, and wait for the thread. Twice does no harm."""
        if self._thread is None:
            self._end()
        else:
            self.call(self.finish)
            self._thread.join()

    def finish(self) -> None:
        """From the loop's own thread: end soon."""
        self._stopping = True

    def _run(self) -> None:
        try:
            more = False
            while not self._stopping:
                more = self._turn(more)
        except BaseException as error:
            self.error = error
        finally:
            self._end()

    def _turn(self, more: bool) -> bool:
        """Timers, events, work; ``more``: without waiting. Returns what ``work`` does."""
        timeout_s = self._fire() if self._timers else None
        if self._look_until and not more:
            ready = self._look()
        else:
            ready = self._epoll.poll(0.0 if more else timeout_s, MAX_EVENTS)
        for fd, events in ready:
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback(events)
        more = self._work()
        if self._retired:
            self._close_retired()
        return more

    def _look(self) -> list[tuple[int, int]]:
        """Look for what is expected, without sleeping while there is time left. Work is to follow."""
        while not (ready := self._epoll.poll(0.0, MAX_EVENTS)) and not self._peek():
            if time.monotonic() > self._look_until:
                self._look_until = 0.0
                self._blind = self._blind_left = min(2 * self._blind + 1, MAX_BLIND)
                break
            os.sched_yield()  # there may be more to do than processors
        return ready

    def _fire(self) -> float | None:
        """Call what is due; returns how long there will be nothing to do, None: for ever."""
        timers, fired = self._timers, False
        while timers:
            due, _, timer = timers[0]
            if timer.live:
                left = due - time.monotonic()
                if left > 0.0:
                    return 0.0 if fired else left
                fired = True
            heapq.heappop(timers)
            timer.fire()
        return 0.0 if fired else None

    def _woken(self, events: int) -> None:
        del events
        os.eventfd_read(self._wake)
        # As many as there are now: a call that calls again waits for its turn.
        for _ in range(len(self._calls)):
            self._calls.popleft()()

    def _end(self) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        while self._calls:
            self._try(self._calls.popleft())
        self._try(self._on_end)
        self._close_retired()
        self._epoll.close()
        os.close(self._wake)
        self._try(self._on_closed)

    def _try(self, call: Callable[[], None]) -> None:
        """Whatever fails at the end, the rest of it still happens."""
        try:
            call()
        except BaseException as error:
            self.error = self.error or error

    def _close_retired(self) -> None:
        if self._retired:
            for sock in self._retired:
                sock.close()
            self._retired.clear()
