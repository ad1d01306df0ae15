# SPDX-License-Identifier: Apache-2.0
"""Programs that results are held against: without one its tests are skipped, which CI must not do."""

from __future__ import annotations

import os
import shutil

import pytest


@pytest.mark.skipif(not os.environ.get("CI"), reason="only continuous integration has to have all programs")
@pytest.mark.parametrize(
    "program",
    [
        "cpio",
        "curl",
        "docker-registry",
        "iasl",
        "lz4",
        "mmdebstrap",
        "openssl",
        "readelf",
        "skopeo",
        "socat",
        "softhsm2-util",
        "umoci",
    ],
)
def test_all_are_here(program: str) -> None:
    assert shutil.which(program), "tools/test-programs installs it"
