# SPDX-License-Identifier: Apache-2.0
"""``enclave lint``: what it prints for people and for programs, and its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from lint_cases import holds, kernel, runs
from lint_images import FILE, Recipe

from enclavekit.cli.main import run_command
from enclavekit.image.kernel_features import Feature
from enclavekit.inspection.findings import RULES

DOCUMENT = Path(__file__).parents[3] / "docs" / "lint.md"


@pytest.fixture(autouse=True)
def _away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(recipe: Recipe) -> str:
    Path("a.eif").write_bytes(recipe.made())
    return "a.eif"


def changed(*changes: object) -> Recipe:
    recipe = Recipe()
    for change in changes:
        change(recipe)  # type: ignore[operator]
    return recipe


def test_a_clean_image(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["lint", "--memory", "1G", saved(Recipe())]) == 0
    assert capsys.readouterr() == ("nothing found\n", "")
    assert run_command(["lint", "--memory", "1G", "--json", "a.eif"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "Findings": []}


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = changed(kernel(Feature.NSM, Feature.VSOCK), runs(uid=0))
    assert run_command(["lint", "--memory", "1G", saved(recipe)]) == 3
    assert capsys.readouterr().out == (
        "error   kernel-vsock  kernel: no virtio vsock driver, going by its strings\n"
        "        hint: CONFIG_VIRTIO_VSOCKETS=y\n"
        "warning kernel-nsm  kernel: no NSM driver, going by its strings\n"
        "        hint: CONFIG_NSM=y, in Linux 6.8 and later, or the module nsm.ko in the boot ramdisk\n"
        "note    user-root  /config: the program runs as root\n"
        "        hint: enclave build --user USER\n"
        "1 error, 1 warning, 1 note\n"
    )
    assert run_command(["lint", "-q", "--memory", "1G", "a.eif"]) == 3
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["error", "kernel-vsock"],
        ["warning", "kernel-nsm"],
        ["note", "user-root"],
    ]


def test_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["lint", "--json", "--memory", "1G", saved(changed(kernel(Feature.NSM)))]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1,
        "Findings": [
            {
                "code": "kernel-nsm",
                "level": "warning",
                "where": "kernel",
                "message": "no NSM driver, going by its strings",
                "hint": "CONFIG_NSM=y, in Linux 6.8 and later, or the module nsm.ko in the boot ramdisk",
            }
        ],
    }


def test_strict_and_carrier_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    image = saved(changed(kernel(Feature.MP_TABLE)))
    assert run_command(["lint", image]) == 0
    assert run_command(["lint", "--strict", image]) == 3
    assert run_command(["lint", "--carrier", "nitro", image]) == 3
    assert run_command(["lint", "--strict", "--carrier", "qemu", image]) == 0
    assert run_command(["lint", "--memory", "32", image]) == 3
    assert run_command(["lint", "--strict", saved(changed(runs(uid=0)))]) == 0  # notes never count
    capsys.readouterr()


def test_hostile_text_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    image = saved(changed(holds({"rootfs/\x1b[31m\n/x": (FILE, b""), "[bold]": (FILE, b"")})))
    assert run_command(["lint", "--memory", "1G", image]) == 0
    out = capsys.readouterr().out
    assert "/rootfs/\\x1b[31m\\n/x: cannot be made: no \\x1b[31m\\n\n" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (None, "file", "cannot read a.eif: no such file or directory"),
        (b"text" * 200, "eif", "a.eif: EIF header: magic b'text', expected b'.eif'"),
        (b".eif", "truncated", "a.eif: EIF header: need 548 bytes, have 4"),
    ],
)
def test_what_cannot_be_read(data: bytes | None, code: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if data is not None:
        Path("a.eif").write_bytes(data)
    assert run_command(["lint", "--json", "a.eif"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    error = json.loads(captured.err)["error"]
    assert (error["code"], error["message"].partition(";")[0]) == (code, message)


def test_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["lint", "--memory", "much", saved(Recipe())]) == 2
    assert run_command(["lint", "--carrier", "pigeon", "a.eif"]) == 2
    assert capsys.readouterr().out == ""


def test_the_document_has_every_rule() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\w+) \| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert rows == [(code, rule.level.value, rule.text) for code, rule in RULES.items()]
