# SPDX-License-Identifier: Apache-2.0
"""``enclave lab`` where no lab is up, or none can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from enclavekit.cli.main import run_command


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))


def test_what_needs_one_says_that_none_is_up(capfd: pytest.CaptureFixture[str]) -> None:
    for words, code in (
        (["down"], 1),
        (["logs"], 1),
        (["cp", "a", "lab:/b"], 1),
        (["run", "--", "true"], 125),
        (["shell"], 125),
    ):
        assert run_command(["lab", *words]) == code
        assert capfd.readouterr().err == "enclave: lab lab: is not up\nhint: enclave lab up\n"


def test_status_without_any(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["lab", "status"]) == 0
    assert run_command(["lab", "status", "--json"]) == 0
    said = capfd.readouterr().out
    assert said.startswith("none is up: enclave lab up\n")
    assert json.loads(said.partition("\n")[2]) == {"schema": 1, "labs": []}


@pytest.mark.parametrize("words", [["a", "b"], ["x:/a", "y:/b"], ["./a:b", "c"]])
def test_copies_between_two_of_a_kind(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["lab", "cp", *words]) == 2
    assert capfd.readouterr().err == (
        "enclave: one of the two, and only one, is of the form NAME:PATH\nhint: enclave lab cp a.eif lab:/root/\n"
    )


@pytest.mark.parametrize("value", ["x", "=x"])
def test_environment(value: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["lab", "run", "-e", value, "--", "true"]) == 125
    assert capfd.readouterr().err == f"enclave: --env '{value}': expected NAME=VALUE\n"


def test_without_a_runtime(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["lab", "up", "--qemu", "/no/such"]) == 4
    assert capfd.readouterr().err == "enclave: /no/such: no such program\nhint: name a qemu-system-x86_64\n"
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho QEMU emulator version 11.0.0\n")
    program.chmod(0o755)
    assert run_command(["lab", "up", "--qemu", str(program)]) == 4
    assert capfd.readouterr().err == (
        "enclave: the parent's root file system is not there\nhint: enclave lab install\n"
    )
