# SPDX-License-Identifier: Apache-2.0
"""Ids, CIDs and directories of enclaves: unique, swept, and nobody else's."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from enclavekit.enclave.directory import claim
from enclavekit.errors import FileError, LaunchError


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    return tmp_path / "enclavekit"


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
