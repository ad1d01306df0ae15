# SPDX-License-Identifier: Apache-2.0
"""Ids, CIDs and directories of enclaves: unique, swept, and nobody else's."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from enclavekit.enclave import directory
from enclavekit.enclave.directory import claim, ended, find, running
from enclavekit.errors import FileError, LaunchError, NoEnclaveError
from enclavekit.linux.locks import locked


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    return tmp_path / "enclavekit"


def test_a_name_with_a_number(runtime: Path) -> None:
    made = [claim(runtime, name="web", numbered=True) for _ in range(3)]
    assert [one.state["name"] for one in made] == ["web", "web_1", "web_2"]
    for one in made:
        one.remove()


def test_cids_are_the_lowest_that_are_free(runtime: Path) -> None:
    first, second = claim(runtime), claim(runtime)
    assert (first.cid, second.cid) == (16, 17)
    assert first.enclave_id != second.enclave_id
    first.remove()
    third = claim(runtime)
    assert third.cid == 16
    second.remove()
    third.remove()


def test_an_id_is_eight_hex_digits_and_a_private_directory(runtime: Path) -> None:
    claimed = claim(runtime)
    assert len(claimed.enclave_id) == 8
    assert int(claimed.enclave_id, 16) >= 0
    assert claimed.path.stat().st_mode & 0o777 == 0o700
    assert runtime.stat().st_mode & 0o777 == 0o700
    state = json.loads((claimed.path / "state.json").read_text())
    assert (state["id"], state["cid"], state["pid"]) == (claimed.enclave_id, 16, os.getpid())
    claimed.remove()
    assert not claimed.path.exists()


def test_a_cid_that_is_taken_is_refused(runtime: Path) -> None:
    claimed = claim(runtime, 20)
    with pytest.raises(LaunchError) as caught:
        claim(runtime, 20)
    assert str(caught.value) == f"CID 20: enclave {claimed.enclave_id} has it"
    claimed.remove()


def test_what_a_dead_process_left_is_swept(runtime: Path) -> None:
    claim(runtime).remove()
    stale = runtime / "0badcafe"
    stale.mkdir()
    (stale / "lock").touch()
    (stale / "state.json").write_text('{"cid": 16}')
    claimed = claim(runtime)
    assert not stale.exists()
    assert claimed.cid == 16
    claimed.remove()


def test_a_broken_state_does_not_confuse(runtime: Path) -> None:
    first = claim(runtime)
    (first.path / "state.json").write_text("{")
    second = claim(runtime)
    assert second.enclave_id != first.enclave_id
    first.remove()
    second.remove()


def claim_and_remove(runtime: Path) -> None:
    for _ in range(150):
        claim(runtime).remove()


def test_two_processes_that_come_and_go_do_not_disturb_each_other(runtime: Path) -> None:
    claim(runtime).remove()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=claim_and_remove, args=(runtime,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_directory_open_to_others_is_refused(runtime: Path) -> None:
    runtime.mkdir(mode=0o755)
    with pytest.raises(FileError, match="expected a directory of user"):
        claim(runtime)


def test_a_symlink_in_its_place_is_refused(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    runtime.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="expected a directory of user"):
        claim(runtime)


def test_a_file_in_its_place_is_refused(runtime: Path) -> None:
    runtime.write_text("")
    with pytest.raises(FileError, match="cannot make the directory"):
        claim(runtime)


def test_names_are_nobody_elses(runtime: Path) -> None:
    first = claim(runtime, name="web")
    assert first.state["name"] == "web"
    with pytest.raises(LaunchError) as caught:
        claim(runtime, name="web")
    assert caught.value.message == f"name web: enclave {first.enclave_id} has it"
    with pytest.raises(LaunchError):
        claim(runtime, name=first.enclave_id)
    for name in ("", "-a", "a/b", "a b", "x" * 65):
        with pytest.raises(LaunchError, match=r"^name '"):
            claim(runtime, name=name)
    assert [state["name"] for state in running(runtime)] == ["web"]
    first.remove()
    assert running(runtime) == []


def test_one_that_has_ended_is_remembered(runtime: Path) -> None:
    first = claim(runtime, name="web")
    (first.path / "output.log").write_text("said")
    (first.path / ".state.json").write_text("half")
    first.end(reason="exited", exit_code=3)
    path, state = find(runtime, "web", also_ended=True)
    assert path == runtime / "ended" / first.enclave_id
    assert (state["reason"], state["exit_code"], state["state"]) == ("exited", 3, "ended")
    assert sorted(one.name for one in path.iterdir()) == ["lock", "output.log", "state.json"]
    with pytest.raises(NoEnclaveError) as caught:
        find(runtime, "web")
    assert caught.value.message == "enclave 'web': has ended (exited)"
    with pytest.raises(NoEnclaveError) as caught:
        find(runtime, "none", also_ended=True)
    assert caught.value.message == "enclave 'none': none has that name or id"
    second = claim(runtime, name="web")
    assert find(runtime, "web", also_ended=True)[0] == second.path
    second.remove()


def test_one_whose_process_was_killed_is_remembered_as_that(runtime: Path) -> None:
    def claim_and_die() -> None:
        claim(runtime, name="victim")
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=claim_and_die)
    process.start()
    process.join()
    assert running(runtime) == []
    (state,) = ended(runtime)
    assert (state["name"], state["reason"], state["state"]) == ("victim", "killed", "ended")
    assert sorted(path.name for path in runtime.iterdir()) == ["ended", "lock", "parent"]


def test_who_looks_sees_it_running_or_ended(runtime: Path) -> None:
    one = claim(runtime)
    (one.path / "control.sock").touch()
    with locked(runtime / "lock"):
        ending = threading.Thread(target=one.end, kwargs={"reason": "exited"})
        ending.start()
        ending.join(0.2)
        assert ending.is_alive()
        assert sorted(path.name for path in one.path.iterdir()) == ["control.sock", "lock", "state.json"]
        assert ended(runtime) == []
    ending.join()
    assert running(runtime) == []
    assert [state["reason"] for state in ended(runtime)] == ["exited"]


@pytest.mark.parametrize("step_s", [1.0, -86400.0, 1e9])
def test_only_the_last_that_ended_are_kept_however_the_clock_jumps(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    monkeypatch.setattr(directory, "MAX_ENDED", 3)
    clock = itertools.count(time.time(), step_s)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    for number in range(5):
        one = claim(runtime, name="web")
        one.end(reason="exited", exit_code=number)
        os.utime(runtime / "ended" / one.enclave_id, (max(time.time(), 0),) * 2)
    assert [state["exit_code"] for state in ended(runtime)] == [2, 3, 4]
    assert find(runtime, "web", also_ended=True)[1]["exit_code"] == 4


@contextmanager
def full_disk() -> Iterator[None]:
    """No file takes a byte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_error_and_holds_nobody(runtime: Path) -> None:
    with full_disk(), pytest.raises(FileError, match=r"^cannot write .*/state\.json: "):
        claim(runtime)
    assert running(runtime) == []
    one = claim(runtime, name="web")
    with full_disk():
        with pytest.raises(FileError, match=r"^cannot write .*/state\.json: "):
            one.write_state(state="running")
        one.end(reason="exited", exit_code=0)
    assert running(runtime) == []
    assert [(state["name"], state["state"]) for state in ended(runtime)] == [("web", "ended")]


def test_a_directory_that_somebody_removed_disturbs_nobody(runtime: Path) -> None:
    first, second = claim(runtime), claim(runtime)
    shutil.rmtree(first.path)
    assert [state["id"] for state in running(runtime)] == [second.enclave_id]
    first.end(reason="exited", exit_code=0)
    assert ended(runtime) == []
    second.remove()


@pytest.mark.parametrize("state", ["", "{", "[]", '{"id": "other"}', "[" * 100_000])
def test_a_state_that_is_damaged_is_nobodys(runtime: Path, state: str) -> None:
    claimed = claim(runtime)
    (claimed.path / "state.json").write_text(state)
    assert running(runtime) == []
    claimed.remove()
