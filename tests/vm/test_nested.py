# SPDX-License-Identifier: Apache-2.0
"""The carrier ``kvm`` boots Debian's kernel to init, on the true /dev/kvm of a nested machine."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import Enclave
from nested import PROGRAMS, run_nested

BOOTS = [f"{protocol}:{cpus}" for protocol in ("eif", "linux", "pvh", "realmode") for cpus in (1, 2)]
TIMEOUT_S = 1500
"""For eight boots; a very busy machine took a minute for each."""

SCRIPT = f"""
set -e
python3 /boots.py {" ".join(BOOTS)}
"""
TOLD = """
nproc
ls /dev/nsm
cat /sys/class/misc/hw_random/rng_current
busybox head -c 8 /dev/hwrng | busybox wc -c
exit 42
"""


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_debian_boots_by_each_protocol_with_one_cpu_and_two(rootfs: Path, tmp_path: Path) -> None:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        if os.environ.get("CI"):
            pytest.fail(f"not installed: {', '.join(missing)}")
        pytest.skip(f"not installed: {', '.join(missing)}")
    image = tmp_path / "image.eif"
    build = Enclave(tmp_path)("build", "-q", f"dir:{rootfs}", "-o", image, "--logs", "--", "sh", "-c", TOLD)
    assert build.returncode == 0, build.stderr
    files = {"image.eif": image, "boots.py": Path(__file__).with_name("nested_boots.py")}
    result = run_nested(SCRIPT, files, timeout_s=TIMEOUT_S)
    assert result.status == 0, result.console
    boots = [json.loads(line.partition(" ")[2]) for line in result.console.splitlines() if line.startswith("boot: ")]
    assert [f"{boot['protocol']}:{boot['cpus']}" for boot in boots] == BOOTS
    for boot in boots:
        assert boot.get("exit_code") == 42, boot
        assert boot["output"] == [str(boot["cpus"]), "/dev/nsm", "nsm-hwrng", "8"], boot
