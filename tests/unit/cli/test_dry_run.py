# SPDX-License-Identifier: Apache-2.0
"""enclave run --dry-run: all that a launch would fail with, and nothing started."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from cli_files import go_away, make_kernel, make_rootfs

from enclavekit.cli.main import run_command


@pytest.fixture(autouse=True)
def _away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_away(tmp_path, monkeypatch)
    (tmp_path / "run").mkdir(mode=0o700)
    Path("qemu").write_text('#!/bin/sh\necho "QEMU emulator version 11.1.0"\n[ "$1" = --version ] || touch started\n')
    Path("qemu").chmod(0o755)


@pytest.fixture
def image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    kernel, rootfs = make_kernel(tmp_path), make_rootfs()
    assert run_command(["build", f"dir:{rootfs}", "-o", "a.eif", "--kernel", str(kernel), "--", "/bin/app"]) == 0
    capsys.readouterr()
    return Path("a.eif")


def dry_run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, Any]]:
    qemu = str(Path("qemu").absolute())
    code = run_command(["run", *map(str, words), "--dry-run", "--json", "--accel", "tcg", "--qemu", qemu])
    assert not Path("started").exists()
    return code, json.loads(capsys.readouterr().out)


def test_what_a_launch_would_be(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, made = dry_run(capsys, image, "--cpus", "2", "--name", "web", "--publish", "0:80")
    assert list(made) == [
        "schema", "ok", "carrier", "accel", "memory", "boot", "memory_map", "cpus", "mode", "cid", "name",
        "measurements", "checks", "lint",
    ]  # fmt: skip
    assert (made["carrier"], made["accel"], made["memory"]) == ("qemu", "tcg", 256 << 20)
    assert (made["cpus"], made["mode"], made["cid"], made["name"]) == (2, "production", 16, "web")
    assert list(made["measurements"]) == ["HashAlgorithm", "PCR0", "PCR1", "PCR2"]
    assert [check["name"] for check in made["checks"]] == [
        "carrier", "image", "boot", "memory", "cpus", "identity", "publish",
    ]  # fmt: skip
    assert all(check["ok"] for check in made["checks"])


def test_everything_that_is_wrong_at_once(image: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, made = dry_run(
            capsys, image, "--cpus", "99", "--name", "a b", "--carrier", "qemu", "--cgroup", tmp_path,
            "--publish", f"{port}:80", "--set", "A=b",
        )  # fmt: skip
    assert (code, made["ok"]) == (125, False)
    failed = {check["name"]: (check["code"], check["message"]) for check in made["checks"] if not check["ok"]}
    assert failed == {
        "cpus": ("launch", "CPUs: got 99, expected 1 to 64"),
        "launch values": ("launch", "launch value 'A': not one that the image declares (none)"),
        "identity": ("launch", "name 'a b': expected up to 64 letters, digits, '_', '.' and '-'"),
        "publish": ("file", f"cannot listen on 127.0.0.1:{port}: address already in use"),
        "cgroup": ("launch", f"{tmp_path}: not a directory of cgroup v2: No such file or directory"),
    }


def test_a_damaged_image_and_no_carrier(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)
    assert run_command(["run", str(image), "--dry-run", "--json", "--qemu", "/nowhere"]) == 125
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [(one["name"], one["code"]) for one in checks if not one["ok"]] == [("carrier", "no-qemu"), ("image", "eif")]


def test_for_people(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", str(image), "--dry-run", "--qemu", "/nowhere", "--memory", "64M"]) == 125
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["error   carrier  /nowhere: no such program", "        hint: name a qemu-system-x86_64"]
    assert "error   boot  memory: got 64 MiB, this image needs at least 81 MiB" in lines
