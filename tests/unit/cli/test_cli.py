# SPDX-License-Identifier: Apache-2.0
"""The command line's contract: results on stdout, one clear error on stderr, exit codes, nothing left behind."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_files import go_away, make_kernel, make_rootfs

from enclavekit.cli.main import COMMANDS, run_command


@pytest.fixture(autouse=True)
def _away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_away(tmp_path, monkeypatch)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return make_kernel(tmp_path)


@pytest.fixture
def rootfs() -> Path:
    return make_rootfs()


@pytest.fixture
def image(kernel: Path, rootfs: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run_command(["build", f"dir:{rootfs}", "-o", "a.eif", "--kernel", str(kernel), "--", "/bin/app"]) == 0
    capsys.readouterr()
    return Path("a.eif")


def error(capsys: pytest.CaptureFixture[str]) -> tuple[str, str, str | None]:
    """Code and message of the one JSON error on stderr; stdout must be empty."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    found = json.loads(line)["error"]
    return found["code"], found["message"], found["hint"]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: enclave {command}")


def test_build_describe_and_pcr(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["describe", str(image), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["EifVersion"], described["CheckCRC"], described["Architecture"]) == (4, True, "x86_64")
    assert [section["Type"] for section in described["Sections"]] == [
        "kernel",
        "cmdline",
        "metadata",
        "ramdisk",
        "ramdisk",
    ]
    assert described["Sections"][3]["Offset"] % 4096 == 0
    assert run_command(["pcr", str(image), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["PCR"]) == 96


def test_the_same_inputs_give_the_same_bytes(kernel: Path, rootfs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one.eif", "two.eif"):
        assert run_command(["build", f"dir:{rootfs}", "-o", name, "--kernel", str(kernel), "--", "/bin/app"]) == 0
    assert Path("one.eif").read_bytes() == Path("two.eif").read_bytes()
    one, two = capsys.readouterr().out.split("}\n}\n")[:2]
    assert one == two


def test_a_signed_build(kernel: Path, rootfs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        assert run_command(["keygen", "--cert", f"{name}.crt", "--key", f"{name}.key"]) == 0
    words = ["build", f"dir:{rootfs}", "-o", "a.eif", "--kernel", str(kernel), "--json"]
    good, bad = ["--sign-cert", "one.crt", "--sign-key", "one.key"], ["--sign-cert", "one.crt", "--sign-key", "two.key"]
    capsys.readouterr()
    assert run_command([*words, *good, "--", "/bin/app"]) == 0
    measurements = json.loads(capsys.readouterr().out)["Measurements"]
    assert run_command(["describe", "a.eif", "--strict", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["SignatureCheck"] is True
    assert described["Measurements"] == measurements
    # A key that is not the certificate's: what was there stays, and nothing is made.
    before = sorted(path.name for path in Path().iterdir()), Path("a.eif").read_bytes()
    assert run_command([*words, *bad, "--", "/bin/app"]) == 1
    assert error(capsys)[:2] == ("signing", "the key does not belong to the certificate")
    assert (sorted(path.name for path in Path().iterdir()), Path("a.eif").read_bytes()) == before
    assert run_command([*words, *good[:2], "--", "/bin/app"]) == 2
    assert error(capsys)[1] == "--sign-cert and --sign-key need each other"


def test_words_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["describe", "--json"]) == 2
    assert error(capsys) == ("usage", "missing argument 'F.eif|NAME'", "enclave describe --help")
    assert run_command(["fly", "--json"]) == 2
    assert error(capsys)[0] == "usage"
    assert run_command(["pcr", "--json"]) == 2
    assert error(capsys)[1] == "pcr: expected files or --cert, one of them"


def test_errors_for_people_are_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["describe"]) == 2
    assert capsys.readouterr().err == "enclave: missing argument 'F.eif|NAME'\nhint: enclave describe --help\n"


def test_not_an_eif(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.eif").write_bytes(b"not an image at all" * 100)
    for command in ("describe", "run"):
        fake_qemu()
        words = ["--qemu", str(Path("qemu").absolute())] if command == "run" else []
        assert run_command([command, "x.eif", "--json", *words]) == (125 if command == "run" else 1)
        code, message, _ = error(capsys)
        assert code in ("eif", "format")
        assert message.startswith("x.eif: ")
        assert "magic" in message


def fake_qemu() -> None:
    """Says its version, and fails at all else."""
    Path("qemu").write_text('#!/bin/sh\n[ "$1" = --version ] && echo QEMU emulator version 11.1.0 && exit 0\nexit 1\n')
    Path("qemu").chmod(0o755)


@pytest.mark.parametrize("size", [0, 3, 100, 547, 548, 555])
def test_truncated_before_there_is_a_section(image: Path, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    Path("short.eif").write_bytes(image.read_bytes()[:size])
    assert run_command(["describe", "short.eif", "--json"]) == 1
    code, message, _ = error(capsys)
    assert code in ("truncated", "eif")
    assert message.startswith("short.eif: ")


@pytest.mark.parametrize("size", [600, 5000, 20000])
def test_truncated_anywhere(image: Path, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    Path("short.eif").write_bytes(image.read_bytes()[:size])
    assert run_command(["describe", "short.eif", "--json"]) == 1
    described = json.loads(capsys.readouterr().out)
    assert described["Accepted"] is False
    assert any(f"the file ends at 0x{size:x}" in warning for warning in described["Warnings"])
    assert run_command(["describe", "short.eif", "--json", "--strict"]) == 1
    code, message, _ = error(capsys)
    assert code == "truncated"
    assert message.startswith("short.eif: section ")


def test_a_wrong_checksum_is_told_and_fails(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    Path("bad.eif").write_bytes(data)
    assert run_command(["describe", "bad.eif", "--json"]) == 1
    described = json.loads(capsys.readouterr().out)
    assert described["CheckCRC"] is False
    assert described["Warnings"]


def test_unreadable_files(capsys: pytest.CaptureFixture[str]) -> None:
    for name, reason in (("absent.eif", "no such file or directory"), (".", "")):
        assert run_command(["describe", name, "--json"]) == 1
        code, message, _ = error(capsys)
        assert code == "file"
        assert message.startswith(f"cannot read {name}: {reason}")


def test_no_kernel_and_no_qemu(rootfs: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["build", f"dir:{rootfs}", "-o", "b.eif", "--json", "--", "/bin/app"]) == 4
    assert error(capsys) == (
        "no-kernel", "no guest kernel: none is installed by enclave, and none is named", "enclave runtime install",
    )  # fmt: skip
    assert run_command(["run", str(image), "--json"]) == 125
    assert error(capsys) == (
        "no-qemu", "no QEMU: none is installed by enclave, and PATH has none", "enclave runtime install",
    )  # fmt: skip
    assert not Path("b.eif").exists()


def test_a_kernel_that_is_none(rootfs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("vmlinux").write_bytes(b"\x7fELF" + bytes(100_000))
    words = ["build", f"dir:{rootfs}", "-o", "b.eif", "--json", "--kernel", "vmlinux", "--", "/bin/app"]
    assert run_command(words) == 1
    code, message, _ = error(capsys)
    assert (code, message) == ("kernel", "vmlinux: not a kernel: no bzImage (x86_64) and no Image (aarch64)")
    assert sorted(path.name for path in Path().iterdir()) == ["rootfs", "vmlinux"]


def test_a_kernel_for_another_architecture(rootfs: Path, kernel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "build",
        f"dir:{rootfs}",
        "-o",
        "b.eif",
        "--json",
        "--kernel",
        str(kernel),
        "--arch",
        "aarch64",
        "--",
        "/bin/app",
    ]
    assert run_command(words) == 1
    assert error(capsys)[1] == f"{kernel}: a kernel for x86_64, expected one for aarch64"


def test_too_little_memory_says_how_much(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_qemu()
    words = ["run", str(image), "--json", "--memory", "64M", "--qemu", str(Path("qemu").absolute()), "--accel", "tcg"]
    assert run_command(words) == 125
    assert error(capsys) == (
        "memory", "memory: got 64 MiB, this image needs at least 81 MiB", "--memory 81M, or --memory auto",
    )  # fmt: skip


def test_a_qemu_that_fails_is_told_and_leaves_nothing(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    fake_qemu()
    words = ["run", str(image), "--json", "--qemu", str(Path("qemu").absolute()), "--accel", "tcg"]
    assert run_command(words) == 125
    assert error(capsys)[:2] == ("carrier", "QEMU ended with exit status 1")
    assert sorted(path.name for path in (tmp_path / "run/enclavekit").iterdir()) == ["ended", "lock", "parent"]
    (ended,) = (tmp_path / "run/enclavekit/ended").iterdir()
    assert json.loads((ended / "state.json").read_text())["reason"] == "carrier"


def test_an_images_command_is_fixed(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_qemu()
    qemu = ["--qemu", str(Path("qemu").absolute()), "--accel", "tcg", "--json"]
    assert run_command(["run", str(image), *qemu, "--", "/bin/other"]) == 125
    assert error(capsys)[1] == "a.eif: an image's command is fixed when it is built"
    assert run_command(["run", str(image), *qemu, "--env", "A=b"]) == 125
    assert error(capsys)[1] == "a.eif: an image's env is fixed when it is built"


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow past 10 000 bytes: what a full disk is to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing(kernel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rootfs").mkdir()
    Path("b.eif").write_bytes(b"what was there before")
    words = ["build", "dir:rootfs", "-o", "b.eif", "--json", "--kernel", str(kernel), "--", "/bin/app"]
    with small_files():
        assert run_command(words) == 1
    code, message, _ = error(capsys)
    assert code == "file"
    assert message.startswith("cannot write ")
    assert message.endswith("b.eif: file too large")
    assert Path("b.eif").read_bytes() == b"what was there before"
    assert sorted(path.name for path in Path().iterdir()) == ["b.eif", "rootfs"]


@pytest.mark.parametrize("epoch", ["-1", "x", "99999999999"])
def test_a_source_date_epoch_that_is_none(
    epoch: str, kernel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    words = ["build", "dir:.", "-o", "b.eif", "--json", "--kernel", str(kernel), "--", "/bin/app"]
    assert run_command(words) == 2
    assert error(capsys)[1] == f"SOURCE_DATE_EPOCH: got '{epoch}', expected seconds from 0 to 4294967295"


def test_runtime_show_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["runtime", "show", "--json"]) == 4
    shown = json.loads(capsys.readouterr().out)
    assert (shown["schema"], shown["installed"]) == (1, [])
