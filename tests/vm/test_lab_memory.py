# SPDX-License-Identifier: Apache-2.0
"""Donated pages: each side fills its memory, looks for the other's pattern, and finds none; nor does the host."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Enclave
from ne_machine import compiled
from test_lab import Lab, up

HERE = Path(__file__).parent
MIB = 1 << 20
PARENTS, ENCLAVES = 0x3B, 0xA5
"""Bytes of the patterns, inverted: so programs that look for one do not hold it."""
RUN = 256
"""Equal bytes that make a pattern."""
DONATED, FILLED = 160 * MIB, 32 * MIB
"""As patterns.py and pattern.c have them."""


@pytest.fixture
def lab(rootfs: Path, tmp_path: Path) -> Iterator[Lab]:
    """With an image that fills its memory, and what launches it."""
    program = Enclave(tmp_path)
    files = tmp_path / "files"
    files.mkdir()
    compiled(HERE / "guest/pattern.c", files)
    root = shutil.copytree(rootfs, tmp_path / "root", symlinks=True)
    shutil.copy2(files / "pattern", root / "bin")
    (files / "patterns.py").write_bytes((HERE / "host/patterns.py").read_bytes())
    words = ("pattern", "enclave", "7000", hex(ENCLAVES), hex(PARENTS))
    built = program("build", "-q", f"dir:{root}", "-o", files / "pattern.eif", "--", *words)
    assert built.returncode == 0, built.stderr
    assert program("lab", "install").returncode == 0
    made = up(tmp_path, "--memory", "512M", "--enclave-memory", f"{DONATED // MIB}M")
    assert program("lab", "cp", files, "lab:/root/files").returncode == 0
    yield made
    program("lab", "down")


def patterns(process: int, name: str, inverted: int) -> int:
    """How often a pattern is in a memfd of this name that a process has mapped or open."""
    needle = bytes([inverted ^ 0xFF]) * RUN
    link = next(link for link in Path(f"/proc/{process}/fd").iterdir() if f"memfd:{name}" in str(link.readlink()))
    found, place = 0, 0
    with link.open("rb", buffering=0) as memory:
        size = os.fstat(memory.fileno()).st_size
        while place < size:
            found += os.pread(memory.fileno(), MIB, place).count(needle)
            place += MIB
    return found


def test_neither_side_sees_the_others_memory(lab: Lab) -> None:
    words = ("patterns.py", "pattern.eif", "./pattern", hex(PARENTS), hex(ENCLAVES))
    program = subprocess.Popen(
        lab.enclave.words("lab", "run", "--", "bash", "-c", f"cd files && exec python3 {' '.join(words)}"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=lab.enclave.environment(),
    )  # fmt: skip
    with program:
        assert program.stdin is not None
        assert program.stdout is not None
        (parent_own, parent_other), (enclave_own, enclave_other) = (
            map(int, program.stdout.readline().split()) for _ in range(2)
        )
        assert parent_own >= DONATED // RUN
        assert enclave_own >= FILLED // RUN
        assert (parent_other, enclave_other) == (0, 0)
        (machine,) = lab.machines
        parent = int(str(lab.state["qemu_pid"]))
        assert patterns(parent, "parent-memory", ENCLAVES) == 0
        assert patterns(parent, "parent-memory", PARENTS) >= DONATED // RUN
        assert patterns(machine, "enclave-memory", PARENTS) == 0
        assert patterns(machine, "enclave-memory", ENCLAVES) >= FILLED // RUN
        program.stdin.close()
        assert program.wait(100) == 0
    assert lab.machines == set()
    left = patterns(parent, "parent-memory", PARENTS)
    assert left < DONATED // RUN // 10, "what was donated came back empty: what fills it has one copy besides"
