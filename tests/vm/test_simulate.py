# SPDX-License-Identifier: Apache-2.0
"""``enclave simulate``: C programs to the public ABI, unmodified; every error that one can reach; a real boot."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from conftest import Enclave
from ne_machine import compiled
from ne_rows import LEAKS, ROWS

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
MIB = 1 << 20


@pytest.fixture(scope="session")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(HERE / "host/ne_steps.c", tmp_path_factory.mktemp("steps"))


@pytest.fixture(scope="session")
def basic_flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(EXAMPLES / "basic_flow.c", tmp_path_factory.mktemp("flow"))


MEM, CPUS, START = f"mem=0:{64 * MIB}", ("cpu=0", "cpu=0"), "start=0:0"
LETTERS = dict(zip("abcdefzn", (1, 5, 2, 6, 3, 7, 4, 8), strict=True))


@pytest.mark.parametrize("name", [*ROWS, *LEAKS])
def test_what_the_driver_answers(enclave: Enclave, steps: Path, name: str) -> None:
    """The same as the kernel's own, test_lab_device.py."""
    row = (ROWS | LEAKS)[name]
    options = ["--regions", str(row.regions), "--slots", str(row.slots)]
    options += ["--cores", "0"] if not row.pool else []
    options += ["--strict"] if row.strict else []
    options += ["--end-after", "0"] if row.end else []
    options += ["--fail", f"{row.fail[0]}={row.fail[1]}"] if row.fail else []
    done = enclave("simulate", "-q", *options, "--", steps, *row.words(LETTERS))
    assert done.returncode == 0, done.stderr
    assert [int(number) for number in done.stdout.split()] == row.expected(LETTERS)


@pytest.mark.parametrize(
    ("options", "words", "expected"),
    [
        (["--strict"], [MEM], "0 263"),
        (["--fail", "SLOT_ADD_MEM=EINVAL"], [MEM, f"mem={64 * MIB}:{64 * MIB}"], "0 22 0"),
        (["--silent"], [], "110"),
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
