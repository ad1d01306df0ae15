# SPDX-License-Identifier: Apache-2.0
"""enclave explain: every code that any command prints."""

from __future__ import annotations

import json

import pytest

from enclavekit import errors
from enclavekit.cli.explain_code import explanations
from enclavekit.cli.main import run_command
from enclavekit.inspection.findings import RULES
from enclavekit.nitro_cli.codes import Code


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["explain", "no-qemu"]) == 0
    assert capsys.readouterr().out == (
        "no-qemu (error): No usable QEMU.\n`enclave runtime install`, or name one with `--qemu`.\n"
    )


def test_nitro_clis(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["explain", "e26", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1,
        "explanations": [
            {
                "code": "E26",
                "origin": "nitro-cli",
                "meaning": "The memory asked for is too little: it has to be four times the image's size.",
                "remedy": "Ask for more memory, or make the image smaller.",
            }
        ],
    }


def test_one_code_of_two_origins(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["explain", "memory", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["explanations"]
    assert [one["origin"] for one in found] == ["error", "lint"]


@pytest.mark.parametrize("word", ["266", "NE_ERR_NO_MEM_REGIONS_ADDED", "ne_err_no_mem_regions_added"])
def test_the_drivers_errors(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["explain", word, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["explanations"]
    kind = next(one for one in errors.DriverError.__subclasses__() if one.number == 266)
    assert (found["code"], found["origin"]) == (kind.code, "error")


def test_a_code_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["explain", "no-kemu"]) == 2
    assert capsys.readouterr().err == "enclave: 'no-kemu': no such code\nhint: did you mean no-qemu?\n"


def test_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    codes = [one.code for one in explanations()]
    assert [line.split()[0] for line in lines] == codes
    assert {f"E{number:02}" for number in range(61)} == {str(code) for code in Code} <= set(codes)
    assert set(RULES) <= set(codes)
    assert len({(one.code, one.origin) for one in explanations()}) == len(codes)
