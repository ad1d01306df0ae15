# SPDX-License-Identifier: Apache-2.0
"""A guest that writes 100 MiB to its console: minutes, for each byte passes an emulated serial port."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENCLAVE = Path(sys.executable).with_name("enclave")
SIZE = 100 << 20
LIMIT = 4 << 20
STATUS = 4

pytestmark = pytest.mark.soak


def test_a_flood_of_100_mib_on_the_console(tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}

    def enclave(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ENCLAVE, *words], env=environment, capture_output=True, text=True, timeout=3000, check=False
        )

    make = HERE.parents[1] / "examples/hello/make_rootfs.py"
    subprocess.run([sys.executable, make, tmp_path / "rootfs"], check=True)
    script = f"yes flood | head -c {SIZE}; echo; echo the-last-line; exit {STATUS}"
    source = f"dir:{tmp_path}/rootfs"
    started = enclave("run", "-d", source, "--accel", "tcg", "--debug", "--name", "loud", "--", "sh", "-c", script)
    assert started.returncode == 0, started.stderr
    done = enclave("wait", "loud")
    assert done.returncode == STATUS, done.stderr
    (place,) = (runtime / "enclavekit/ended").iterdir()
    sizes = {path.name: path.stat().st_size for path in place.glob("console.log*")}
    assert set(sizes) == {"console.log", "console.log.1"}
    assert max(sizes.values()) <= LIMIT
    assert b"flood\r\n" in (place / "console.log.1").read_bytes()
    assert b"the-last-line" in (place / "console.log").read_bytes()
