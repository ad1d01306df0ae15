# SPDX-License-Identifier: Apache-2.0
"""The sample that reads as the documentation runs, and is short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from enclavekit.eif import BytesContent
from enclavekit.hypervisor.parts import Parts

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / "examples/basic_flow.py"


def test_the_sample(tmp_path: Path) -> None:
    image = tmp_path / "a.eif"
    with image.open("wb") as file:
        Parts(BytesContent(b"K" * 700), b"console=ttyS0", [BytesContent(b"1" * 99)]).write(file)
    done = subprocess.run(
        [sys.executable, SAMPLE, image, "--simulated"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "CID 16, 512 MiB, CPUs [1, 5]\nrunning\nended\n"


def test_it_is_short() -> None:
    assert len(SAMPLE.read_text().splitlines()) < 60


def test_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/driver.md").read_text(), re.DOTALL)
    exec(compile(block, "docs/driver.md", "exec"), {"__name__": "snippets"})  # noqa: S102 - our own page
    assert capsys.readouterr().out == (
        "NE_SET_USER_MEMORY_REGION: cannot allocate memory (errno 12)\n"
        "265 reserve larger huge pages, early after boot, so that fewer are needed\n"
    )
