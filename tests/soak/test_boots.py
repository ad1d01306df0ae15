# SPDX-License-Identifier: Apache-2.0
"""Twenty boots of twenty: one at a time, and ten at once; two hundred in the background."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENCLAVE = Path(sys.executable).with_name("enclave")
BOOTS = 20
CYCLES = 200
STATUS = 42

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("soak")
    make = HERE.parents[1] / "examples/hello/make_rootfs.py"
    subprocess.run([sys.executable, make, where / "rootfs"], check=True)
    command: list[str | Path] = [
        ENCLAVE,
        "build",
        f"dir:{where}/rootfs",
        "-o",
        where / "soak.eif",
        "--",
        "sh",
        "-c",
        f"exit {STATUS}",
    ]
    subprocess.run(command, check=True)
    return where / "soak.eif"


def boot(image: Path, runtime: Path, *words: str) -> tuple[int, float, str]:
    start = time.monotonic()
    done = subprocess.run(
        [ENCLAVE, "run", "--accel", "tcg", *words, image],
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    return done.returncode, time.monotonic() - start, done.stderr


def report(name: str, results: list[tuple[int, float, str]]) -> None:
    times = sorted(passed for _, passed, _ in results)
    print(f"{name}: median {times[len(times) // 2]:.1f} s, longest {times[-1]:.1f} s")  # noqa: T201
    bad = [(status, said) for status, _, said in results if status != STATUS]
    assert not bad, f"{len(bad)} of {len(results)} boots failed: {bad}"


def test_twenty_alone(image: Path, tmp_path: Path) -> None:
    report("alone", [boot(image, tmp_path) for _ in range(BOOTS)])


def test_twenty_ten_at_once(image: Path, tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        report("ten at once", list(pool.map(lambda _: boot(image, tmp_path), range(BOOTS))))


@pytest.mark.parametrize("memory", ["256M", "5G"])
@pytest.mark.parametrize("cpus", ["1", "2"])
@pytest.mark.parametrize("protocol", ["eif", "linux", "pvh", "realmode"])
def test_twenty_of_each_protocol(protocol: str, cpus: str, memory: str, image: Path, tmp_path: Path) -> None:
    words = ("--boot", protocol, "--cpus", cpus, "--memory", memory)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        report(" ".join(words), list(pool.map(lambda _: boot(image, tmp_path, *words), range(BOOTS))))


def test_two_hundred_in_the_background(image: Path, tmp_path: Path) -> None:
    """Started, waited for, forgotten: nothing is left, and only the last are remembered."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}

    def cycle(number: int) -> int:
        words: list[str | Path] = [ENCLAVE, "run", "-d", "--accel", "tcg", "--name", f"e{number}", image]
        subprocess.run(words, env=environment, capture_output=True, timeout=600, check=True)
        return subprocess.run([ENCLAVE, "wait", f"e{number}"], env=environment, timeout=600, check=False).returncode

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(cycle, range(CYCLES))) == [STATUS] * CYCLES
    left = sorted(path.name for path in (tmp_path / "enclavekit").iterdir())
    assert left == ["ended", "lock", "parent"]
    assert len(list((tmp_path / "enclavekit/ended").iterdir())) == 64
    mine = [path for path in Path("/proc").glob("[0-9]*/environ") if str(tmp_path).encode() in _read(path)]
    assert mine == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
