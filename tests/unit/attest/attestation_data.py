# SPDX-License-Identifier: Apache-2.0
"""Documents that lie beside the project: signed by AWS, damaged, and made; tests that need them skip without."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

DIRECTORY = Path(__file__).parents[4] / "shared" / "data" / "attestation"
REAL = DIRECTORY / "real"
MADE = DIRECTORY / "made"

needs_documents = pytest.mark.skipif(not DIRECTORY.is_dir(), reason="../shared/data/attestation is not there")


@cache
def listed(path: Path) -> list[dict[str, Any]]:
    """The entries of an index; none where there is no file."""
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return found


def real() -> list[Any]:
    """A test's parameters: the index's entry of each document that AWS signed."""
    return [pytest.param(entry, id=entry["file"][:4]) for entry in listed(REAL / "index.json")]


def damaged() -> list[Any]:
    """The same of those that were damaged since."""
    return [pytest.param(entry, id=entry["sha256"][:8]) for entry in listed(REAL / "negatives.json")]


def made() -> list[Any]:
    """The same of those that were made for tests."""
    return [pytest.param(entry, id=entry["file"]) for entry in listed(MADE / "vectors.json")]
