# SPDX-License-Identifier: Apache-2.0
"""nitro-cli build-enclave: its flags, words, JSON and exit codes, over our builder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_files import bzimage
from oci_layouts import layout, member
from scripted_daemon import scripted_daemon
from test_docker_daemon import archive

from enclavekit import eif
from enclavekit.nitro_cli.main import run_command


@pytest.fixture(autouse=True)
def _away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SOURCE_DATE_EPOCH", "NITRO_CLI_BLOBS", "DOCKER_HOST", "XDG_RUNTIME_DIR", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("DOCKER_HOST", "tcp://elsewhere")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "blobs"
    made.mkdir()
    (made / "bzImage").write_bytes(bzimage(b"payload"))
    (made / "cmdline").write_text("reboot=k\n")
    (made / "init").write_bytes(b"init")
    (made / "nsm.ko").write_bytes(b"nsm")
    monkeypatch.setenv("NITRO_CLI_BLOBS", str(made))
    return made


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/d.sock")
    with scripted_daemon(tmp_path / "d.sock", {"hello:v1": archive("/bin/hello")}) as asked:
        yield asked


def test_a_local_image_and_its_metadata(blobs: Path, daemon: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("m.json").write_text('{"team": "payments"}')
    words = ["build-enclave", "--docker-uri", "hello:v1", "--output-file", "a.eif", "--metadata", "m.json"]
    assert run_command(words) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "Start building the Enclave Image...",
        "Using the locally available Docker image...",
        "Enclave Image successfully created.",
    ]
    made = json.loads(captured.out)
    assert list(made) == ["Measurements"]
    assert list(made["Measurements"]) == ["HashAlgorithm", "PCR0", "PCR1", "PCR2"]
    described = eif.describe(Path("a.eif"))
    assert described["Measurements"] == made["Measurements"]
    assert described["ImageName"] == "hello"
    metadata = described["Metadata"]
    assert metadata["team"] == "payments"
    info = metadata["DockerInfo"]
    assert described["ImageVersion"] == info["Id"].removeprefix("sha256:")
    assert {name: info[name] for name in ("Architecture", "Config", "Os")} == {
        "Architecture": "amd64",
        "Config": {"Cmd": ["/bin/hello"]},
        "Os": "linux",
    }


def test_name_version_and_signature(blobs: Path, daemon: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from enclavekit.cli.main import run_command as enclave

    assert enclave(["keygen", "--cert", "c.pem", "--key", "k.pem"]) == 0
    capsys.readouterr()
    words = ["build-enclave", "--docker-uri", "hello:v1", "--output-file", "a.eif", "--name", "n", "--version", "7"]
    assert run_command([*words, "--signing-certificate", "c.pem", "--private-key", "k.pem"]) == 0
    assert "PCR8" in json.loads(capsys.readouterr().out)["Measurements"]
    described = eif.describe(Path("a.eif"))
    assert (described["ImageName"], described["ImageVersion"]) == ("n", "7")
    assert described["SignatureCheck"] is True


def test_without_blobs_it_is_our_init_and_kernel(
    tmp_path: Path, daemon: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build-enclave", "--docker-uri", "hello:v1", "--output-file", "a.eif"]
    assert run_command(words) == 52
    error = capsys.readouterr().err
    assert "[ E52 ]" in error
    assert "enclave runtime install" in error
    assert not Path("a.eif").exists()


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A buildah that builds one image, whatever it is told, and notes what that was."""
    (tmp_path / "bin").mkdir()
    made = layout(tmp_path / "layout", [member("file", b"content")], run={"Cmd": ["/app"]})
    script = tmp_path / "bin/buildah"
    script.write_text(
        '#!/bin/sh\necho "$@" >> $HOME/calls\necho progress\n'
        f'[ $1 = push ] && /bin/tar -C {made} -cf "${{3#oci-archive:}}" . || true\n[ ! -e $HOME/fail ]\n'
    )
    script.chmod(0o755)
    (tmp_path / "home").mkdir()
    (tmp_path / "context").mkdir()
    return tmp_path / "home/calls"


def test_a_dockerfile_is_built_by_a_program_that_can(
    blobs: Path, programs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["build-enclave", "--docker-uri", "mine:1", "--docker-dir", "context", "--output-file", "a.eif"]
    assert run_command(words) == 0
    captured = capfd.readouterr()
    assert list(json.loads(captured.out)) == ["Measurements"]
    assert "progress" in captured.err
    calls = programs.read_text().splitlines()
    assert calls[0] == "build --tag mine:1 -- context"
    assert calls[1].startswith("push mine:1 oci-archive:/")
    assert eif.describe(Path("a.eif"))["ImageName"] == "mine"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--output-file", "a.eif"], 2, "Missing option '--docker-uri'"),
        (["--docker-uri", "a", "--output-file", "a.eif", "--private-key", "k"], 2, "need each other"),
        (["--docker-uri", "A", "--output-file", "a.eif"], 50, "names are lower case"),
        (["--docker-uri", "hello:v1", "--output-file", "none/a.eif"], 19, "[ E19 ]"),
        (["--docker-uri", "a", "--output-file", "a.eif", "--metadata", "none"], 19, "[ E19 ]"),
        (["--docker-uri", "a", "--output-file", "a.eif", "--metadata", "bad.json"], 17, "[ E17 ]"),
        (["--docker-uri", "a", "--output-file", "a.eif", "--metadata", "long.json"], 19, "more than 4096 bytes"),
        (
            ["--docker-uri", "a", "--output-file", "a.eif", "--signing-certificate", "c", "--private-key", "k"],
            60,
            "[ E60 ]",
        ),
        (["--docker-uri", "a", "--docker-dir", "none", "--output-file", "a.eif"], 49, "with a Dockerfile"),
        (["--docker-uri", "a", "--docker-dir", ".", "--output-file", "a.eif"], 49, "neither buildah nor docker"),
    ],
)
def test_failures(
    blobs: Path, daemon: list[str], words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.json").write_text("{")
    Path("long.json").write_text(" " * 4097)
    assert run_command(["build-enclave", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert not Path("a.eif").exists()


def test_a_dockerfile_that_fails(blobs: Path, programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    programs.with_name("fail").touch()
    words = ["build-enclave", "--docker-uri", "a", "--docker-dir", "context", "--output-file", "a.eif"]
    assert run_command(words) == 49
    assert "buildah build: failed with status 1" in capsys.readouterr().err
