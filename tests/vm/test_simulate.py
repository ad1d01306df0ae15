# SPDX-License-Identifier: Apache-2.0
"""``enclave simulate``: C programs to the public ABI, unmodified; every error that one can reach; a real boot."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Enclave

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
MIB = 1 << 20
POLLHUP = 1000 + 0x10


def compiled(source: Path, directory: Path) -> Path:
    target = directory / source.stem
    subprocess.run(
        [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-musl", "-Os", "-static", "-s", "-Wall",
         "-Wextra", "-Werror", "-o", target, source],
        check=True,
    )  # fmt: skip
    return target


@pytest.fixture(scope="session")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(HERE / "host/ne_steps.c", tmp_path_factory.mktemp("steps"))


@pytest.fixture(scope="session")
def basic_flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(EXAMPLES / "basic_flow.c", tmp_path_factory.mktemp("flow"))


MEM, CPUS, START = f"mem=0:{64 * MIB}", ("cpu=0", "cpu=0"), "start=0:0"
ROWS: dict[str, tuple[tuple[str, ...], int]] = {
    "256": (("cpu=1", "cpu=1"), 256),
    "257": (("cpu=4",), 257),
    "257 another's": (("cpu=1", "create", "cpu=5"), 257),
    "259": ((f"mem=0:{2 * MIB + 4096}",), 259),
    "260": ((f"at={1 << 63}:{2 * MIB}",), 260),
    "261": ((f"mem=4096:{2 * MIB}",), 261),
    "262": ((f"mem=0:{4 * MIB}", f"mem={2 * MIB}:{4 * MIB}"), 262),
    "266": ((START,), 266),
    "267": ((MEM, START), 267),
    "268": ((f"mem=0:{62 * MIB}", *CPUS, START), 268),
    "269": ((MEM, "cpu=0", START), 269),
    "270": ((MEM, *CPUS, START, "cpu=0"), 270),
    "271": (("cpu=8",), 271),
    "272": (("cpu=0",) * 7, 272),
    "274 info": (("info=0",), 274),
    "274 memory": ((f"mem=0:{2 * MIB}:1",), 274),
    "274 start": (("start=2:0",), 274),
    "275": (("start=0:3",), 275),
    "275 large": ((f"start=0:{1 << 32}",), 275),
    "ENOTTY": (("other=0xae25",), 25),
    "ENOTTY node": (("node=0xc004ae21",), 25),
    "EFAULT argument": (("fault=0xc004ae21",), 14),
    "EFAULT memory": ((f"at={1 << 32}:{2 * MIB}",), 14),
    "ENOMEM": (("mem=0:0",), 12),
    "EIO": (("child=cpu=0",), 5),
    "all goes well": (("info=1", MEM, *CPUS, "poll=0", "start=1:20"), 0),
}


@pytest.mark.parametrize("row", list(ROWS))
def test_each_error_that_a_program_can_reach(enclave: Enclave, steps: Path, row: str) -> None:
    words, expected = ROWS[row]
    done = enclave("simulate", "-q", "--", steps, *words)
    assert done.returncode == 0, done.stderr
    *before, last = [int(number) for number in done.stdout.split()]
    assert before == [0] * len(words), "all steps but the last succeed"
    assert last == expected


@pytest.mark.parametrize(
    ("options", "words", "expected"),
    [
        (["--strict"], [MEM], "0 263"),
        (["--regions", "1"], [MEM, f"mem={128 * MIB}:{2 * MIB}"], "0 0 265"),
        (["--cores", "0"], [], "272"),
        (["--slots", "1"], ["create"], "0 12"),
        (["--fail", "SLOT_ADD_MEM=EINVAL"], [MEM, f"mem={64 * MIB}:{64 * MIB}"], "0 22 0"),
        (["--silent"], [], "110"),
        (["--end-after", "0"], [MEM, *CPUS, START, "poll=20000", "poll=0"], f"0 0 0 0 0 {POLLHUP} {POLLHUP}"),
        ([], [MEM, *CPUS, START, "child=poll=0", "poll=0"], "0 0 0 0 0 0 0"),
    ],
)
def test_a_machine_as_it_is_asked_for(
    enclave: Enclave, steps: Path, options: list[str], words: list[str], expected: str
) -> None:
    done = enclave("simulate", *options, "--", steps, *words)
    assert done.stdout.strip() == expected, done.stderr


def test_ordinary_memory_is_warned_of_once(enclave: Enclave, steps: Path) -> None:
    done = enclave("simulate", "--", steps, MEM, f"mem={64 * MIB}:{64 * MIB}")
    assert done.stderr == (
        "enclave: ordinary memory is taken for huge pages: the driver refuses it with NE_ERR_MEM_NOT_HUGE_PAGE (263)\n"
    )


def test_the_programs_own_status_and_files(enclave: Enclave) -> None:
    done = enclave("simulate", "--", "sh", "-c", "cat /proc/self/comm; exit 3")
    assert (done.returncode, done.stdout) == (3, "cat\n")
    assert enclave("simulate", "--", "sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM
    assert enclave("simulate", "--", "/nowhere/program").returncode == 127


def test_the_sample_without_a_machine(enclave: Enclave, basic_flow: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.eif"
    image.write_bytes(bytes(4 * MIB))
    done = enclave("simulate", "-q", "--end-after", "0.1", "--", basic_flow, image, "64", "2")
    assert (done.returncode, done.stdout) == (0, "slot 17aab64b3f7703d, CID 16\nended\n")
    done = enclave("simulate", "-q", "--", basic_flow, image, "64", "1")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "NE_START_ENCLAVE: 269\n")


def test_the_sample_boots_a_real_image_and_sees_it_end(
    enclave: Enclave, basic_flow: Path, rootfs: Path, tmp_path: Path
) -> None:
    image = tmp_path / "a.eif"
    built = enclave("build", f"dir:{rootfs}", "-o", image, "--", "sh", "-c", "echo from inside > /dev/console")
    assert built.returncode == 0, built.stderr
    done = enclave("simulate", "--carrier", "qemu", "--accel", "tcg", "--", basic_flow, image, "256", "2", "debug")
    assert (done.returncode, done.stdout) == (0, "slot 17aab64b3f7703d, CID 16\nended\n")
    assert "from inside" in done.stderr


def test_what_is_no_image_only_ends(enclave: Enclave, basic_flow: Path, tmp_path: Path) -> None:
    """As with a real hypervisor; we say why."""
    image = tmp_path / "a.eif"
    image.write_bytes(bytes(MIB))
    done = enclave("simulate", "--carrier", "qemu", "--accel", "tcg", "--", basic_flow, image, "64", "2")
    assert (done.returncode, done.stdout) == (0, "slot 17aab64b3f7703d, CID 16\nended\n")
    assert "enclave: the enclave does not start: EIF header: magic" in done.stderr
