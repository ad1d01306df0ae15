# SPDX-License-Identifier: Apache-2.0
"""The pictures of docs/the-nitro-device.md are what the device does now."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools"))

from device_pictures import PICTURES


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_is_drawn_now(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PICTURES[name]().svg(), "run tools/device_pictures.py"


def test_each_picture_is_shown() -> None:
    text = (ROOT / "docs/the-nitro-device.md").read_text()
    assert [name for name in PICTURES if f"({name})" not in text] == []
