# SPDX-License-Identifier: Apache-2.0
"""What ``enclave doctor`` finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How it is."""

    OK = "ok"
    WARNING = "warning"
    """It works, not as well as it could."""
    MISSING = "missing"
    """What this belongs to does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """``area`` is a carrier, ``runtime`` or ``machine``; ``remedy`` what helps, where something does."""

    area: str
    name: str
    state: State
    message: str
    remedy: str | None = None


def ok(area: str, name: str, message: str) -> Finding:
    """As it should be."""
    return Finding(area, name, State.OK, message)


def warning(area: str, name: str, message: str, remedy: str | None) -> Finding:
    """It works, not as well as it could."""
    return Finding(area, name, State.WARNING, message, remedy)


def missing(area: str, name: str, message: str, remedy: str | None) -> Finding:
    """What this belongs to does not work."""
    return Finding(area, name, State.MISSING, message, remedy)
