# SPDX-License-Identifier: Apache-2.0
"""What can be seen without a kernel that lets us; tests/vm/test_control_group.py has one that does."""

from __future__ import annotations

from pathlib import Path

import pytest

from enclavekit.errors import FileError, LaunchError
from enclavekit.linux import cgroup
from enclavekit.linux.cgroup import Cgroup


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup, "REMOVE_TRIES", 1)
    (tmp_path / "cgroup.subtree_control").write_text("cpuset cpu io memory pids\n")
    return tmp_path


def test_limits(parent: Path) -> None:
    group = Cgroup(parent / "one", memory=1 << 30, cpus=2)
    group.add(1234)
    found = {path.name: path.read_text() for path in group.path.iterdir()}
    assert found == {"memory.max": "1073741824\n", "cpu.max": "200000 100000\n", "cgroup.procs": "1234\n"}


@pytest.mark.parametrize(
    ("events", "expected"),
    [(None, False), ("low 0\noom 0\noom_kill 0\n", False), ("oom 1\noom_kill 1\n", True), ("oom_kill x\n", False)],
)
def test_a_kill_for_the_limit_is_known(parent: Path, events: str | None, expected: bool) -> None:
    group = Cgroup(parent / "one", memory=1 << 30, cpus=1)
    if events is not None:
        (group.path / "memory.events").write_text(events)
    assert group.out_of_memory is expected


def test_not_a_cgroup(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="not a directory of cgroup v2: No such file or directory"):
        Cgroup(tmp_path / "one", memory=1, cpus=1)
    assert list(tmp_path.iterdir()) == []


def test_controllers_that_are_not_enabled(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("cpu pids\n")
    with pytest.raises(LaunchError, match="has cpu pids, expected memory and cpu") as raised:
        Cgroup(tmp_path / "one", memory=1, cpus=1)
    assert raised.value.hint == f"echo '+memory' > {tmp_path}/cgroup.subtree_control"


def test_one_that_is_there_already_is_not_taken(parent: Path) -> None:
    (parent / "one").mkdir()
    (parent / "one" / "memory.max").write_text("max\n")
    with pytest.raises(FileError, match=r"cannot make the control group .*: file exists"):
        Cgroup(parent / "one", memory=1, cpus=1)
    assert (parent / "one" / "memory.max").read_text() == "max\n"


def test_gone_is_gone(parent: Path) -> None:
    group = Cgroup(parent / "one", memory=1, cpus=1)
    for path in group.path.iterdir():
        path.unlink()
    group.remove()
    assert not group.path.exists()
    group.remove()
