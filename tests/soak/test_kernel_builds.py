# SPDX-License-Identifier: Apache-2.0
"""Our kernel, built twice in different directories by the same packages: the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from enclavekit.environment import data_directory

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]

ENCLAVE = Path(sys.executable).with_name("enclave")


def test_two_builds_are_one_kernel(tmp_path: Path) -> None:
    found = []
    for name in ("here", "and/somewhere/else"):
        data = tmp_path / name / "data/enclavekit"
        data.mkdir(parents=True)
        (data / "runtime").symlink_to(data_directory() / "runtime")  # nothing is fetched twice
        environment = {
            **os.environ,
            "XDG_DATA_HOME": str(data.parent),
            "XDG_CACHE_HOME": str(tmp_path / name / "cache"),
            "USER": name[:4],
        }
        done = subprocess.run(
            [ENCLAVE, "kernel", "build", "--json"], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        built = json.loads(done.stdout)
        assert built["cached"] is False
        found.append(Path(built["kernel"]["path"]).read_bytes())
    assert found[0] == found[1]
