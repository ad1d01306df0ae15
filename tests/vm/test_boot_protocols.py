# SPDX-License-Identifier: Apache-2.0
"""Every boot protocol boots the same image, and its guest sees the same: command line, memory, CPUs, devices."""

from __future__ import annotations

import concurrent.futures
import re
from pathlib import Path

import pytest
from conftest import Enclave

MACHINES = [(cpus, memory) for cpus in (1, 2) for memory in ("256M", "5G")]
TOLD = """
sed 's/ tsc_early_khz=[0-9]*//' /proc/cmdline
nproc
ls /sys/bus/virtio/devices
dmesg 2>/dev/null | grep -c 'invalid magic'
awk '/MemTotal/ { print $2 }' /proc/meminfo
cat /sys/class/dmi/id/board_asset_tag
exit 42
"""
TOLD_SMALL = """
nproc
awk '/MemTotal/ { print $2 }' /proc/meminfo
exit 42
"""


@pytest.fixture(scope="module")
def image(rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(rootfs, tmp_path_factory.mktemp("protocols") / "image.eif", TOLD)


@pytest.fixture(scope="module")
def small_image(rootfs: Path, small_kernel_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With our own kernel, which has neither ACPI nor DMI."""
    return build(rootfs, tmp_path_factory.mktemp("small") / "image.eif", TOLD_SMALL, "--kernel", small_kernel_name)


def build(rootfs: Path, image: Path, script: str, *words: str) -> Path:
    done = Enclave(image.parent)(
        "build", "-q", f"dir:{rootfs}", "-o", image, "--logs", *words, "--", "sh", "-c", script
    )
    assert done.returncode == 0, done.stderr
    return image


@pytest.fixture(scope="module")
def told(image: Path) -> dict[tuple[int, str], list[str]]:
    """What the guest sees with the protocol that all others are held against."""
    return boots(image, "eif")


def boots(image: Path, protocol: str) -> dict[tuple[int, str], list[str]]:
    def boot(machine: tuple[int, str]) -> list[str]:
        cpus, memory = machine
        done = Enclave(image.parent)(
            *("run", "--accel", "tcg", "--boot", protocol, "--cpus", str(cpus), "--memory", memory, image)
        )
        assert done.returncode == 42, done.stderr
        return done.stdout.splitlines()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(MACHINES, pool.map(boot, MACHINES), strict=True))


@pytest.mark.timeout(400)
def test_cpus_and_memory_are_all_there(told: dict[tuple[int, str], list[str]]) -> None:
    for (cpus, memory), lines in told.items():
        assert lines[1] == str(cpus)
        assert lines[2:-3] == ["virtio0", "virtio1"]
        assert int(lines[-2]) > {"256M": 190_000, "5G": 4_800_000}[memory]
        assert re.fullmatch(r"enclave-[0-9a-f]{8}", lines[-1])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("protocol", ["linux", "pvh", "realmode"])
def test_the_guest_sees_the_same(protocol: str, image: Path, told: dict[tuple[int, str], list[str]]) -> None:
    for machine, lines in boots(image, protocol).items():
        assert lines[:-2] == told[machine][:-2], machine
        # A boot protocol takes a few MiB more or less of what the kernel counts.
        assert abs(int(lines[-2]) - int(told[machine][-2])) < 8192, machine


@pytest.mark.timeout(1800)  # the kernel's build, where there is none yet
@pytest.mark.parametrize("protocol", ["eif", "linux", "pvh", "realmode"])
def test_our_own_kernel(protocol: str, small_image: Path) -> None:
    for (cpus, memory), (found_cpus, found_memory) in boots(small_image, protocol).items():
        assert found_cpus == str(cpus)
        assert int(found_memory) > {"256M": 190_000, "5G": 4_800_000}[memory]
