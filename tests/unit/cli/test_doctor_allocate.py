# SPDX-License-Identifier: Apache-2.0
"""enclave doctor and enclave allocate, as they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_files import go_away

from enclavekit.cli.main import run_command


@pytest.fixture(autouse=True)
def _away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_away(tmp_path, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "run").mkdir(mode=0o700)


def qemu() -> str:
    Path("qemu").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "QEMU emulator version 11.1.0" && exit\n'
        "echo 'name \"vhost-user-vsock-device\"'; echo 'name \"i8042\"'\n"
    )
    Path("qemu").chmod(0o755)
    return str(Path("qemu").absolute())


def test_a_carrier_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--carrier", "qemu", "--qemu", qemu(), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert list(made) == ["schema", "carriers", "chosen", "findings"]
    assert list(made["carriers"]) == ["nitro", "qemu", "kvm"]
    assert made["carriers"]["qemu"] is True
    for finding in made["findings"]:
        assert list(finding) == ["area", "name", "state", "message", "remedy"]
        assert finding["remedy"] or finding["state"] == "ok"


def test_a_carrier_that_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--carrier", "qemu", "--qemu", "/none"]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "qemu  does not work",
        "  missing program: /none: no such program",
        "          remedy: name a qemu-system-x86_64",
    ]
    assert not any(line.startswith("nitro") for line in lines)


def test_allocate_reads_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text("---\nmemory_mib: 512\ncpu_pool: 2,3\n")
    assert run_command(["allocate", "--config", "a.yaml", "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1, "memory_mib": 512, "cpu_count": None, "cpu_pool": [2, 3],
    }  # fmt: skip
    assert run_command(["allocate", "--config", "a.yaml", "--check"]) == 0
    assert capsys.readouterr().out == "a.yaml: 512 MiB, CPUs: 2,3\n"
    Path("a.yaml").write_text("memory_mib: 512\n")
    assert run_command(["allocate", "--config", "a.yaml"]) == 1
    assert run_command(["allocate", "--config", "none.yaml"]) == 1


@pytest.mark.skipif(Path("/sys/module/nitro_enclaves").exists(), reason="the driver is here")
def test_allocate_without_the_driver(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text("---\nmemory_mib: 512\ncpu_count: 2\n")
    assert run_command(["allocate", "--config", "a.yaml"]) == 4
    assert "the driver nitro_enclaves is not loaded" in capsys.readouterr().err
