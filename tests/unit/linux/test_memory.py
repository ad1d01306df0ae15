# SPDX-License-Identifier: Apache-2.0
"""Available memory, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from enclavekit.linux.memory import available_memory

MIB = 1 << 20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    made = tmp_path / "proc"
    (made / "self").mkdir(parents=True)
    (made / "meminfo").write_text("MemTotal:  4194304 kB\nMemAvailable:    1048576 kB\n")
    (made / "self/cgroup").write_text("0::/user/job\n")
    return made


def limit(cgroups: Path, name: str, most: str, used: int, cache: int = 0) -> None:
    directory = cgroups / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{most}\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 5\nfile {cache}\n")


def test_what_the_machine_has(proc: Path, tmp_path: Path) -> None:
    assert available_memory(proc, tmp_path / "none") == 1024 * MIB


def test_a_cgroup_may_have_less(proc: Path, tmp_path: Path) -> None:
    cgroups = tmp_path / "cgroup"
    limit(cgroups, "user/job", "max", 10 * MIB)
    assert available_memory(proc, cgroups) == 1024 * MIB
    limit(cgroups, "user", str(500 * MIB), 300 * MIB, 100 * MIB)
    assert available_memory(proc, cgroups) == 300 * MIB
    limit(cgroups, "user/job", str(200 * MIB), 300 * MIB)
    assert available_memory(proc, cgroups) == 0


@pytest.mark.parametrize("text", ["", "MemAvailable: many kB\n"])
def test_a_kernel_that_does_not_say(tmp_path: Path, text: str) -> None:
    assert available_memory(tmp_path / "none", tmp_path) is None
    (tmp_path / "meminfo").write_text(text)
    assert available_memory(tmp_path, tmp_path) is None


@pytest.mark.parametrize(
    "cgroup", ["0::/../../etc\n", "1:name=systemd:/\n", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")]
)
def test_odd_cgroups_are_none(proc: Path, tmp_path: Path, cgroup: str) -> None:
    (proc / "self/cgroup").write_text(cgroup)
    assert available_memory(proc, tmp_path / "cgroup") == 1024 * MIB
