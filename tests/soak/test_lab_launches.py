# SPDX-License-Identifier: Apache-2.0
"""Fifty launches by the unmodified driver in one parent: each ends, and neither side keeps anything of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENCLAVE = Path(sys.executable).with_name("enclave")
LAUNCHES = 50
MOST_GROWTH = 16 << 20
"""Bytes of memory that our process may use more after all of them than after the first few."""

pytestmark = pytest.mark.soak


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def enclave(home: Path, *words: str | Path) -> str:
    done = subprocess.run(
        [ENCLAVE, *words], env={**os.environ, "XDG_RUNTIME_DIR": str(home)}, capture_output=True, text=True,
        timeout=3600, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture
def lab(home: Path) -> Iterator[int]:
    """The process of a lab, with an image that ends at once, and what launches it."""
    subprocess.run([sys.executable, HERE.parents[1] / "examples/hello/make_rootfs.py", home / "rootfs"], check=True)
    files = home / "files"
    files.mkdir()
    enclave(home, "build", "-q", f"dir:{home}/rootfs", "-o", files / "quick.eif", "--", "/bin/true")
    (files / "launches.py").write_bytes((HERE.parent / "vm/host/launches.py").read_bytes())
    enclave(home, "lab", "install")
    state = json.loads(enclave(home, "lab", "up", "--json", "--enclave-memory", "192M"))
    enclave(home, "lab", "cp", files, "lab:/root/files")
    yield int(state["pid"])
    enclave(home, "lab", "down")


def held(process: int) -> tuple[Counter[str], int]:
    """What a process has open, by kind; and its threads."""
    links = Path(f"/proc/{process}/fd").iterdir()
    kinds = Counter(str(link.readlink()).partition(":[")[0] for link in links)
    return kinds, sum(1 for _ in Path(f"/proc/{process}/task").iterdir())


def resident(process: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def launch(home: Path, count: int) -> list[int]:
    *cids, pages = enclave(
        home, "lab", "run", "--", "python3", "files/launches.py", "files/quick.eif", str(count)
    ).splitlines()
    free, total = pages.split()
    assert free == total
    return [int(cid) for cid in cids]


def test_fifty_launches(home: Path, lab: int) -> None:
    first = launch(home, 3)
    before, size = held(lab), resident(lab)
    rest = launch(home, LAUNCHES - 3)
    assert first + rest == list(range(16, 16 + LAUNCHES))
    assert held(lab) == before
    assert resident(lab) - size < MOST_GROWTH
