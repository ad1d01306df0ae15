# SPDX-License-Identifier: Apache-2.0
"""One directory a lab, and nothing of those that died."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from enclavekit.errors import LabError, NoLabError
from enclavekit.lab.directory import claim, find, up


def test_a_lab_is_up_once(tmp_path: Path) -> None:
    labs = tmp_path / "labs"
    assert up(labs) == []
    directory = claim(labs, "one")
    with pytest.raises(LabError) as caught:
        claim(labs, "one")
    assert (caught.value.message, caught.value.hint) == (
        "lab one: is up already",
        "enclave lab status, or enclave lab down",
    )
    assert up(labs) == []  # on its way
    directory.write_state({"name": "one", "pid": os.getpid()})
    assert find(labs, "one") == (labs / "one", {"name": "one", "pid": os.getpid()})
    other = claim(labs, "other")
    other.write_state({"name": "other"})
    assert [path.name for path, _ in up(labs)] == ["one", "other"]
    for each in (directory, other):
        each.remove()
    assert [path.name for path in labs.iterdir()] == [".lock"]
    with pytest.raises(NoLabError) as gone:
        find(labs, "one")
    assert (gone.value.message, gone.value.hint) == ("lab one: is not up", "enclave lab up")


def test_what_a_dead_one_left_is_taken_away(tmp_path: Path) -> None:
    labs = tmp_path / "labs"
    live = claim(labs, "live")
    live.write_state({"name": "live"})
    dead = labs / "dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "state.json").write_text('{"name": "dead"}')
    (labs / "half").mkdir()
    assert [path.name for path, _ in up(labs)] == ["live"]
    assert sorted(path.name for path in labs.iterdir()) == [".lock", "live"]
    live.remove()


@pytest.mark.parametrize("state", ["", "[]", "{", "\0", "[" * 100000])
def test_a_damaged_state_is_none(tmp_path: Path, state: str) -> None:
    directory = claim(tmp_path / "labs", "one")
    (directory.path / "state.json").write_text(state)
    assert up(tmp_path / "labs") == []
    directory.remove()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-a", "a" * 33, "ä"])
def test_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(LabError) as caught:
        claim(tmp_path / "labs", name)
    assert caught.value.message == f"name {name!r}: expected up to 32 letters, digits, '_', '.' and '-'"
