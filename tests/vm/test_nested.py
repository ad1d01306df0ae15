# SPDX-License-Identifier: Apache-2.0
"""The carrier ``kvm`` boots Debian's kernel, and our own, on the true /dev/kvm of a nested machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Enclave
from nested import run_nested

DEBIAN = [f"debian:{protocol}:{cpus}:512" for protocol in ("eif", "linux", "pvh", "realmode") for cpus in (1, 2)]
LARGE = "debian:eif:2:5120"
SMALL = "small:eif:1:128"
BOOTS = [*DEBIAN, LARGE, SMALL]
TIMEOUT_S = 1500
"""For ten boots; a very busy machine took a minute for each."""

SCRIPT = f"""
set -e
python3 /boots.py {" ".join(BOOTS)}
"""
TOLD = """
nproc
ls /dev/nsm
cat /sys/class/misc/hw_random/rng_current
busybox head -c 8 /dev/hwrng | busybox wc -c
grep MemTotal /proc/meminfo
exit 42
"""
CLOCKS = """
cat /sys/devices/system/clocksource/clocksource0/current_clocksource
cat /sys/class/ptp/ptp0/clock_name
exit 42
"""


@pytest.fixture(scope="module")
def boots(rootfs: Path, small_kernel_name: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each came to, all in one machine."""
    directory = tmp_path_factory.mktemp("nested")
    files = {"boots.py": Path(__file__).with_name("nested_boots.py")}
    for name, script, words in (("debian", TOLD, []), ("small", CLOCKS, ["--kernel", small_kernel_name])):
        files[f"{name}.eif"] = image = directory / f"{name}.eif"
        build = Enclave(directory)(
            "build", "-q", f"dir:{rootfs}", "-o", image, "--logs", *words, "--", "sh", "-c", script
        )
        assert build.returncode == 0, build.stderr
    result = run_nested(SCRIPT, files, timeout_s=TIMEOUT_S)
    assert result.status == 0, result.console
    found = [json.loads(line.partition(" ")[2]) for line in result.console.splitlines() if line.startswith("boot: ")]
    assert [boot["boot"] for boot in found] == BOOTS
    for boot in found:
        assert boot.get("exit_code") == 42, boot
    return {boot["boot"]: boot for boot in found}


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("name", [*DEBIAN, LARGE])
def test_debian_boots_by_each_protocol_with_one_cpu_and_two(boots: dict[str, dict[str, Any]], name: str) -> None:
    *_, cpus, mib = name.split(":")
    *told, memory = boots[name]["output"]
    assert told == [cpus, "/dev/nsm", "nsm-hwrng", "8"]
    total = int(memory.split()[1]) >> 10
    assert int(mib) * 0.8 < total < int(mib)


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_our_kernel_has_the_clocks_of_kvm(boots: dict[str, dict[str, Any]]) -> None:
    assert boots[SMALL]["output"] == ["kvm-clock", "KVM virtual PTP"]
