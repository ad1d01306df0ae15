# SPDX-License-Identifier: Apache-2.0
"""enclave.toml and enclave.lock on the command line: defaults, what counts more, what is locked, what is explained."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from cli_files import go_away, make_kernel, make_rootfs

from enclavekit.build.project import KEYS, template
from enclavekit.cli.build import build
from enclavekit.cli.main import run_command
from enclavekit.cli.run import run
from enclavekit.codec.init_config import InitConfig
from enclavekit.eif import Lock, describe, read
from enclavekit.image.initramfs import open_ramdisk

DOCS = Path(__file__).parents[3] / "docs/project.md"


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


@pytest.fixture
def project(kernel: Path, rootfs: Path) -> Path:
    """A directory with all that an image is made of."""
    path = Path("enclave.toml")
    path.write_text(
        f'[image]\nsource = "dir:{rootfs}"\noutput = "made.eif"\n[kernel]\npath = "{kernel}"\n'
        '[command]\nentrypoint = ["/bin/app", "a b"]\nenv = { A = "1", B = "2" }\nlogs = true\n'
    )
    return path


def config(path: str = "made.eif") -> InitConfig:
    with Path(path).open("rb") as file, open_ramdisk(file, read(file).ramdisks[1], name=path) as ramdisk:
        (found,) = [one for one in ramdisk.files if one.entry.name == b"config"]
        return InitConfig.decode(b"".join(found.content.chunks()))


def failure(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> tuple[str, str, str | None]:
    capsys.readouterr()
    assert run_command([*words, "--json"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    error = json.loads(captured.err)["error"]
    return error["code"], error["message"], error["hint"]


def locked() -> dict[str, Any]:
    return json.loads(Path("enclave.lock").read_text())  # type: ignore[no-any-return]


def test_the_file_says_all_that_is_not_said(project: Path) -> None:
    assert run_command(["build"]) == 0
    assert config() == InitConfig((b"/bin/app", b"a b"), (b"A=1", b"B=2"), logs=True)


def test_what_is_said_counts_more_and_variables_are_added(project: Path) -> None:
    assert run_command(["build", "-o", "other.eif", "--no-logs", "--env", "B=3", "--env", "C=4", "--", "more"]) == 0
    assert config("other.eif") == InitConfig((b"/bin/app", b"a b", b"more"), (b"A=1", b"B=3", b"C=4"))
    assert not Path("made.eif").exists()


def test_a_source_is_said_and_the_file_is_not_meant(
    project: Path, kernel: Path, rootfs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["build", f"dir:{rootfs}", "-o", "b.eif", "--kernel", str(kernel), "--", "/bin/app"]) == 0
    assert config("b.eif") == InitConfig((b"/bin/app",))
    assert not Path("enclave.lock").exists()
    words = ["build", f"dir:{rootfs}", "-o", "b.eif", "--config", str(project)]
    assert run_command(words) == 0
    assert config("b.eif").environment == (b"A=1", b"B=2")
    assert Path("enclave.lock").exists()
    project.unlink()
    code, message, _ = failure(capsys, 2, "build", "-o", "b.eif")
    assert (code, message) == ("usage", "missing argument 'SOURCE'")
    assert failure(capsys, 1, *words) == (
        "file",
        "cannot read enclave.toml: no such file or directory",
        "enclave init makes one",
    )


def test_a_file_elsewhere_has_its_paths_there(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert run_command(["build", "--config", "../work/enclave.toml"]) == 0
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [
        "enclave.lock", "enclave.toml", "made.eif", "rootfs",
    ]  # fmt: skip
    assert list(Path().iterdir()) == []


def test_a_file_that_is_wrong_is_one_error(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project.write_text('[image]\nsorce = "dir:x"\n')
    assert failure(capsys, 1, "build") == (
        "project",
        "enclave.toml: image.sorce: unknown key",
        "did you mean image.source?",
    )


def test_resources_are_of_run(project: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project.write_text(project.read_text() + '[resources]\nmemory = "odd"\n')
    code, message, _ = failure(capsys, 125, "run", str(image), "--config", str(project), "--qemu", "/bin/false")
    assert (code, message) != ("", "")
    assert "command" not in message


def test_every_key_is_an_option_and_documented() -> None:
    options = {
        word
        for command in (build, run)
        for parameter in command.params
        for word in (*parameter.opts, *parameter.secondary_opts)
    }
    names = {parameter.name for command in (build, run) for parameter in command.params}
    text = DOCS.read_text()
    for key in KEYS:
        assert key.option in options or key.option in ("SOURCE", "-- COMMAND...")
        assert key.parameter in names
    rows = re.findall(r"^\| `([a-z]+\.[a-z0-9-]+)` \| `([^`]+)` \|", text, re.MULTILINE)
    assert rows == [(key.path, key.option) for key in KEYS]


def test_init_writes_a_file_that_can_be_used(kernel: Path, rootfs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["init", f"dir:{rootfs}"]) == 0
    assert capsys.readouterr().out == "enclave.toml\n"
    assert Path("enclave.toml").read_text() == template(f"dir:{rootfs}")
    assert run_command(["build", "--kernel", str(kernel), "--", "/bin/app"]) == 0
    assert describe(Path("app.eif"))["Warnings"] == []
    code, message, hint = failure(capsys, 2, "init")
    assert (code, message, hint) == ("usage", "enclave.toml: is there already", "--force replaces it")
    assert run_command(["init", "--force"]) == 0
    assert Path("enclave.toml").read_text() == template()
    assert failure(capsys, 2, "init", "rootfs", "--force")[0] == "usage"


def test_locked_twice_the_same_file(project: Path, rootfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert run_command(["build"]) == 0
    before = Path("made.eif").read_bytes()
    assert Lock.parse(Path("enclave.lock").read_bytes()).epoch == 1700000000
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert run_command(["build", "--locked"]) == 0
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    assert Path("made.eif").read_bytes() == before


def test_what_has_moved_is_said_and_nothing_is_made(
    project: Path, rootfs: Path, kernel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["build"]) == 0
    lock, image = Path("enclave.lock").read_bytes(), Path("made.eif").read_bytes()

    code, message, hint = failure(capsys, 3, "build", "--locked", "--env", "A=2")
    assert code == "locked"
    assert re.fullmatch(r"enclave\.lock: configuration: locked sha384:[0-9a-f]{16}…, now sha384:[0-9a-f]{16}…", message)
    assert hint == "without --locked the lock file is made anew"

    (rootfs / "new").write_text("")
    code, message, hint = failure(capsys, 3, "build", "--locked")
    assert re.fullmatch(r"enclave\.lock: PCR0: locked .{17}, now .{17}; PCR2: locked .{17}, now .{17}", message)
    assert hint == "the files of the source have changed; without --locked the lock file is made anew"
    (rootfs / "new").unlink()
    os.utime(rootfs)

    kernel.write_bytes(kernel.read_bytes() + b"\n")
    code, message, hint = failure(capsys, 3, "build", "--locked")
    assert message.startswith("enclave.lock: kernel: locked bzImage (sha384:")
    digest = next(one["digest"] for one in locked()["inputs"] if one["name"] == "kernel")
    assert hint is not None
    assert hint.startswith(f"enclave kernel import FILE, of the kernel bzImage with {digest}; ")
    assert (Path("enclave.lock").read_bytes(), Path("made.eif").read_bytes()) == (lock, image)


def test_a_kernel_that_was_imported_is_found_by_its_digest(project: Path, kernel: Path, tmp_path: Path) -> None:
    project.write_text(project.read_text().replace(f'path = "{kernel}"', ""))
    assert run_command(["kernel", "import", str(kernel), "--name", "old"]) == 0
    kernel.write_bytes(kernel.read_bytes() + b"\n")
    assert run_command(["kernel", "import", str(kernel), "--name", "new"]) == 0
    assert run_command(["build", "--kernel", "old"]) == 0
    before = Path("made.eif").read_bytes()
    assert run_command(["build", "--locked"]) == 0
    assert Path("made.eif").read_bytes() == before


def test_a_lock_of_ones_own_and_one_that_is_none(
    project: Path, kernel: Path, rootfs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build", f"dir:{rootfs}", "-o", "b.eif", "--kernel", str(kernel), "--lock", "my.lock", "--", "/bin/app"]
    assert run_command(words) == 0
    assert run_command([*words[:1], "--locked", *words[1:]]) == 0
    Path("my.lock").write_text("{}")
    assert failure(capsys, 1, "build", "--locked", "--lock", "my.lock") == (
        "format",
        "my.lock: lock: schema None, expected 1",
        "a build without --locked makes it anew",
    )
    Path("my.lock").unlink()
    assert failure(capsys, 1, "build", "--locked", "--lock", "my.lock")[0] == "file"


def test_a_signed_image_may_be_made_again_by_someone_who_cannot_sign(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["keygen", "--cert", "c.pem", "--key", "k.pem"]) == 0
    assert run_command(["build", "--sign-cert", "c.pem", "--sign-key", "k.pem"]) == 0
    assert "PCR8" in locked()["measurements"]
    assert run_command(["build", "--locked"]) == 0
    assert run_command(["keygen", "--cert", "d.pem", "--key", "l.pem"]) == 0
    code, message, _ = failure(capsys, 3, "build", "--locked", "--sign-cert", "d.pem", "--sign-key", "l.pem")
    assert code == "locked"
    assert message.startswith("enclave.lock: PCR8: locked ")


def test_explain(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["build", "--explain", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    explained = made["Explanation"]
    pcrs = {one["Name"]: one["Covers"] for one in explained["Pcrs"]}
    assert pcrs == {
        "PCR0": ["kernel", "cmdline", "ramdisk-0", "ramdisk-1"],
        "PCR1": ["kernel", "cmdline", "ramdisk-0"],
        "PCR2": ["ramdisk-1"],
    }
    assert {one["Name"]: one["Value"] for one in explained["Pcrs"]} == {
        name: value for name, value in made["Measurements"].items() if name.startswith("PCR")
    }
    inputs = {one["Name"]: [each["Name"] for each in one["Inputs"]] for one in explained["Sections"]}
    assert inputs == {
        "kernel": ["kernel"],
        "cmdline": ["cmdline"],
        "metadata": ["metadata"],
        "ramdisk-0": ["init"],
        "ramdisk-1": ["configuration"],
    }
    assert run_command(["build", "--explain"]) == 0
    text = capsys.readouterr().out
    assert "PCR2  " in text
    assert re.search(r"^metadata: .*, not measured$", text, re.MULTILINE)
    assert re.search(r"^  files +of the source$", text, re.MULTILINE)
