# SPDX-License-Identifier: Apache-2.0
"""The TSC's speed, twice alike."""

from __future__ import annotations

import platform

import pytest

from enclavekit.linux.tsc import TscClock


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the TSC is x86_64's")
def test_two_measurements_agree() -> None:
    first, second = TscClock(), TscClock()
    one, two = first.khz(), second.khz()
    assert one is not None
    assert two is not None
    assert 100_000 < one < 20_000_000
    assert abs(one - two) / one < 0.02
