# SPDX-License-Identifier: Apache-2.0
"""Logs: bounded, followed across rotation, and never a failure."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from enclavekit.enclave import log_file
from enclavekit.enclave.log_file import LogFile, read_log


@pytest.fixture
def log(tmp_path: Path) -> Iterator[LogFile]:
    made = LogFile(tmp_path / "log", limit=10)
    yield made
    made.close()


def whole(path: Path) -> bytes:
    return b"".join(read_log(path))


def test_what_is_written_is_read(log: LogFile, tmp_path: Path) -> None:
    assert whole(tmp_path / "log") == b""
    log.write(b"one")
    log.write(b"two")
    assert whole(tmp_path / "log") == b"onetwo"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_two_files_of_bounded_size_are_kept(log: LogFile, tmp_path: Path) -> None:
    for number in range(10):
        log.write(b"%d%d%d%d" % (number, number, number, number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]
    assert whole(tmp_path / "log") == b"6666777788889999"


def test_a_full_disk_loses_lines_and_nothing_else(log: LogFile, tmp_path: Path) -> None:
    log.write(b"1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        log.write(b"lost")
        log.write(b"too")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    log.write(b"2")
    assert whole(tmp_path / "log") == b"1\n[7 bytes lost here: no room]\n2"


def test_a_directory_that_is_gone_is_no_failure(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "gone" / "log")
    log.write(b"x")
    log.close()
    assert whole(tmp_path / "gone" / "log") == b""


def test_following_sees_all_across_rotation_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "POLL_S", 0.001)
    path = tmp_path / "log"
    log = LogFile(path, limit=50)
    ended = threading.Event()
    got: list[bytes] = []
    seen = threading.Event()

    def read() -> None:
        for chunk in read_log(path, more=lambda: not ended.is_set()):
            if chunk:
                got.append(chunk)
                seen.set()

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(40):
        seen.clear()
        log.write(b"line %02d\n" % number)
        assert seen.wait(10)
    # As at an enclave's end: its directory goes elsewhere, with what was written last.
    log.write(b"last\n")
    log.close()
    (tmp_path / "ended").mkdir()
    os.rename(path, tmp_path / "ended" / "log")  # noqa: PTH104 - in one step
    ended.set()
    reader.join(10)
    assert not reader.is_alive()
    assert b"".join(got) == b"".join(b"line %02d\n" % number for number in range(40)) + b"last\n"
