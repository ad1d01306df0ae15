# SPDX-License-Identifier: Apache-2.0
"""The loop: events, calls from other threads, timers, and an end that is always seen."""

from __future__ import annotations

import gc
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from enclavekit.virtio.loop import Loop, LoopTimer


class Rig:
    """A loop whose end can be waited for."""

    def __init__(self, work: Callable[[], bool] = lambda: False, on_end: Callable[[], None] = lambda: None) -> None:
        self.ended = threading.Event()
        self._on_end = on_end
        self.loop = Loop(work, self._end)

    def _end(self) -> None:
        self.ended.set()
        self._on_end()

    def do(self, call: Callable[[], object]) -> None:
        """Call in the loop's thread, and wait for it."""
        done = threading.Event()

        def run() -> None:
            call()
            done.set()

        assert self.loop.call(run)
        assert done.wait(10)


def test_events_reach_their_callback_and_only_while_watched() -> None:
    rig = Rig()
    ours, theirs = socket.socketpair()
    seen: list[int] = []
    arrived = threading.Event()

    def on_event(events: int) -> None:
        seen.append(events)
        arrived.set()

    rig.loop.watch(ours.fileno(), on_event)
    rig.loop.start("test")
    theirs.send(b"x")
    assert arrived.wait(10)
    rig.do(lambda: rig.loop.forget(ours.fileno()))
    theirs.send(b"y")
    rig.do(lambda: None)
    assert seen == [select.EPOLLIN]
    rig.loop.stop()
    ours.close()
    theirs.close()


def test_forgetting_what_is_not_watched_is_no_harm() -> None:
    rig = Rig()
    rig.loop.forget(0)
    rig.loop.stop()


def test_a_retired_socket_is_closed_without_further_events() -> None:
    rig = Rig()
    ours, theirs = socket.socketpair()
    rig.loop.watch(ours.fileno(), lambda events: None)
    rig.loop.start("test")
    rig.do(lambda: rig.loop.retire(ours))
    theirs.settimeout(10)
    assert theirs.recv(1) == b""
    rig.loop.stop()
    theirs.close()


def test_a_socket_retired_by_the_work_is_closed_though_nothing_else_happens() -> None:
    ours, theirs = socket.socketpair()

    def work() -> bool:
        rig.loop.retire(ours)
        return False

    rig = Rig(work)
    rig.loop.start("test")
    rig.loop.call(lambda: None)
    theirs.settimeout(10)
    assert theirs.recv(1) == b""
    rig.loop.stop()
    theirs.close()


def test_work_is_repeated_while_there_is_more() -> None:
    done = threading.Event()
    left = 5

    def work() -> bool:
        nonlocal left
        left -= 1
        if not left:
            done.set()
        return left > 0

    rig = Rig(work)
    rig.loop.start("test")
    rig.loop.call(lambda: None)
    assert done.wait(10)
    rig.loop.stop()


def test_timers_fire_in_order_once_and_not_when_cancelled() -> None:
    rig = Rig()
    fired: list[str] = []
    last = threading.Event()
    rig.loop.call_later(0.02, lambda: fired.append("second"))
    rig.loop.call_later(0.03, last.set)
    rig.loop.call_later(0.01, lambda: fired.append("first"))
    rig.loop.call_later(0.0, lambda: fired.append("never")).cancel()
    rig.loop.start("test")
    assert last.wait(10)
    rig.loop.stop()
    assert fired == ["first", "second"]


def test_a_timer_fires_once() -> None:
    fired: list[int] = []
    timer = LoopTimer(lambda: fired.append(1))
    timer.fire()
    timer.fire()
    assert fired == [1]


def test_calls_that_call_again_do_not_hold_the_loop() -> None:
    rig = Rig()
    rig.loop.start("test")
    count = 0

    def again() -> None:
        nonlocal count
        count += 1
        rig.loop.call(again)

    rig.loop.call(again)
    rig.do(lambda: None)
    rig.loop.stop()
    assert count > 0


class Expecting:
    """A loop, turned by hand, whose work expects something ``wanted`` times. Nothing is there before the third look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, look_s: float) -> None:
        monkeypatch.setattr("enclavekit.virtio.loop.LOOK_S", look_s)
        self.wanted = self.looks = self.works = 0
        self.found_at = 3
        self.loop = Loop(self._work, lambda: None, peek=self._peek)

    def _work(self) -> bool:
        self.works += 1
        if self.wanted:
            self.wanted -= 1
            self.loop.expect()
        return False

    def _peek(self) -> bool:
        self.looks += 1
        return self.looks == self.found_at

    def event(self) -> None:
        """One that finds the loop asleep."""
        self.loop.call(lambda: None)
        self.loop._turn(False)

    def disappointed(self) -> bool:
        """An event, after which something is expected that does not come: was it looked for?"""
        before, self.found_at = self.looks, 0
        self.wanted = 1
        self.event()
        if self.loop._look_until:
            self.loop._turn(False)
        return self.looks > before


def test_what_is_expected_is_found_without_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Expecting(monkeypatch, 10.0)
    rig.event()
    assert (rig.looks, rig.works) == (0, 1)
    rig.wanted = 1
    rig.event()
    rig.loop._turn(False)
    assert (rig.looks, rig.works) == (3, 3)
    rig.loop.stop()


def test_an_event_ends_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Expecting(monkeypatch, 10.0)
    rig.wanted = 1
    rig.event()
    rig.event()
    assert (rig.looks, rig.works) == (0, 2)
    rig.loop.stop()


def test_work_that_is_not_done_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Expecting(monkeypatch, 10.0)
    rig.wanted = 1
    rig.event()
    rig.loop._turn(True)
    assert (rig.looks, rig.works) == (0, 2)
    rig.loop.stop()


def test_where_expectations_are_disappointed_there_are_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work follows each, since who peeked may not have been told."""
    rig = Expecting(monkeypatch, 0.0)
    looked = [number for number in range(400) if rig.disappointed()]
    assert looked == [0, 2, 6, 14, 30, 62, 126, 190, 254, 318, 382]
    assert rig.works == 400 + len(looked)
    rig.loop.stop()


def test_an_expectation_that_comes_true_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Expecting(monkeypatch, 0.0)
    for _ in range(7):
        rig.disappointed()
    monkeypatch.setattr("enclavekit.virtio.loop.LOOK_S", 10.0)
    rig.looks, rig.found_at, rig.wanted = 0, 3, 9
    for _ in range(8):
        rig.event()  # the last disappointment was not long ago
    assert rig.loop._look_until
    rig.loop._turn(False)
    monkeypatch.setattr("enclavekit.virtio.loop.LOOK_S", 0.0)
    assert rig.looks == 3
    rig.loop._turn(False)
    assert [rig.disappointed() for _ in range(4)] == [False, True, False, False]
    rig.loop.stop()


def test_stop_ends_the_thread_and_later_calls_are_refused() -> None:
    rig = Rig()
    rig.loop.start("test")
    rig.loop.stop()
    rig.loop.stop()
    assert rig.ended.is_set()
    assert rig.loop.call(lambda: None) is False
    assert rig.loop.error is None


def test_a_loop_that_never_started_ends_as_well() -> None:
    called: list[int] = []
    rig = Rig()
    rig.loop.call(lambda: called.append(1))
    rig.loop.stop()
    assert rig.ended.is_set()
    assert called == [1]


def test_an_exception_ends_the_loop_and_is_kept() -> None:
    rig = Rig()
    rig.loop.start("test")

    def fail() -> None:
        raise RuntimeError("unexpected")

    rig.loop.call(fail)
    assert rig.ended.wait(10)
    rig.loop.stop()
    assert repr(rig.loop.error) == "RuntimeError('unexpected')"
    assert rig.loop.call(lambda: None) is False


def test_an_exception_at_the_end_is_kept_unless_there_was_one() -> None:
    def fail() -> None:
        raise RuntimeError("at the end")

    rig = Rig(on_end=fail)
    rig.loop.start("test")
    rig.loop.stop()
    assert repr(rig.loop.error) == "RuntimeError('at the end')"


def test_a_call_that_fails_at_the_end_keeps_nothing_from_ending() -> None:
    rig = Rig()
    called: list[int] = []

    def fail() -> None:
        raise RuntimeError("too late")

    rig.loop.call(fail)
    rig.loop.call(lambda: called.append(1))
    rig.loop.stop()
    assert rig.ended.is_set()
    assert called == [1]
    assert repr(rig.loop.error) == "RuntimeError('too late')"


def test_the_very_last_call_comes_when_all_is_closed() -> None:
    ours, theirs = socket.socketpair()
    closed: list[bool] = []

    def on_end() -> None:
        loop.retire(ours)

    loop = Loop(lambda: False, on_end, lambda: closed.append(ours.fileno() < 0 and loop._epoll.closed))
    loop.watch(ours.fileno(), lambda events: None)
    loop.start("test")
    loop.stop()
    assert closed == [True]
    theirs.close()


def test_no_file_is_left_open() -> None:
    gc.collect()  # what other tests left
    before = len(list(Path("/proc/self/fd").iterdir()))
    rig = Rig()
    rig.loop.start("test")
    rig.loop.stop()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_loop_that_gets_no_thread_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    rig = Rig()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError):
            rig.loop.start("test")
    rig.loop.stop()
    assert rig.ended.is_set()
    assert not rig.loop.call(lambda: None)
