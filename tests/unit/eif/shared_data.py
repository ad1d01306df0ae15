# SPDX-License-Identifier: Apache-2.0
"""Images that lie beside the project, with what is known of them from elsewhere; tests that need them skip without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

DIRECTORY = Path(__file__).parents[4] / "shared" / "data" / "eif"
SIGNED = ("signed-es256.eif", "signed-es384.eif", "signed-es512.eif")
VECTORS = (
    "unsigned.eif",
    "unsigned-arm64.eif",
    "one-ramdisk.eif",
    "v3-no-metadata.eif",
    *SIGNED,
)

needs_shared_data = pytest.mark.skipif(not DIRECTORY.is_dir(), reason="../shared/data/eif is not there")


def expected(name: str) -> dict[str, Any]:
    """Of one image."""
    found: dict[str, Any] = json.loads((DIRECTORY / "expected.json").read_text())[name]
    return found
