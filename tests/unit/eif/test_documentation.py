# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows runs, and what it says of the program is so."""

from __future__ import annotations

import gc
import re
import warnings
from pathlib import Path

import pytest
from eif_images import BOOT, image

from enclavekit.cli.main import COMMANDS

ROOT = Path(__file__).parents[3]


def test_python_snippets_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them, one after another, as the page promises."""
    monkeypatch.chdir(tmp_path)
    Path("app.eif").write_bytes(image())
    Path("damaged.eif").write_bytes(image()[:-100])
    Path("ramdisk.cpio").write_bytes(BOOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    assert len(blocks) >= 9
    names: dict[str, object] = {"__name__": "snippets"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a file that a one-liner leaves open
        for block in blocks:
            exec(compile(block, "docs/python.md", "exec"), names)  # noqa: S102 - our own page
        gc.collect()
    said = capsys.readouterr().out
    assert said.startswith("x86_64 4\nkernel 560 32\n")
    assert "['PCR0', 'PCR1', 'PCR2', 'PCR8']" in said
    assert "truncated section 4: ramdisk ends at 0xdc7, the file ends at 0xd63" in said


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_readme_names_every_command(command: str) -> None:
    assert re.search(rf"`(enclave )?{command}\b", (ROOT / "README.md").read_text())
