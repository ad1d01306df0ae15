# SPDX-License-Identifier: Apache-2.0
"""``enclave verify`` and ``enclave kms-policy`` as people and scripts meet them."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from eif_images import image
from made_documents import DEBUG_PCRS, INSTANCE, MADE, MODULE, PCRS, certificates, document, good_chain, links

from enclavekit.attest import Policy
from enclavekit.cli.main import run_command

NONCE = "6e" * 32
PCR0 = f"0={PCRS[0].hex()}"
THEN = MADE.isoformat()


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files are, with an image and the root of the documents' chain."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    write_root(Path("root.pem"), good_chain())
    Path("app.eif").write_bytes(image())
    Path("doc").write_bytes(
        document(nonce=bytes.fromhex(NONCE), pcrs=PCRS | dict(Policy.from_eif("app.eif").accepted[0]))
    )
    return tmp_path


def write_root(path: Path, chain: tuple[bytes, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(x509.load_der_x509_certificate(chain[0]).public_bytes(Encoding.PEM))


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def verify(*words: str) -> int:
    return run_command(["verify", *words, "--root", "root.pem", "--at", THEN])


def failure(capsys: pytest.CaptureFixture[str]) -> str:
    """The code on stderr, under --json."""
    code: str = json.loads(capsys.readouterr().err.splitlines()[-1])["error"]["code"]
    return code


def test_what_was_proven_and_what_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("doc", "--eif", "app.eif", "--nonce", NONCE) == 0
    said = capsys.readouterr().out
    assert said.startswith("VERIFIED  as of 2026-06-01 12:00:00 UTC; its certificates until 2026-06-01 14:00:00 UTC\n")
    assert f"  signed      by {MODULE}, for which root.pem vouches (" in said
    pcr0 = Policy.from_eif("app.eif").accepted[0][0].hex()[:16]
    assert f"  PCR0        {pcr0}…, as expected: the image\n" in said
    assert "  nonce       the one asked for: made after it was chosen\n" in said
    assert "not proven\n" in said
    assert "  that your connection ends in the enclave: compare its key with one in the document\n" in said


def test_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("doc", "--eif", "app.eif", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["verified"], found["moment"]) == (1, True, "given")
    assert (found["document"]["module_id"], found["document"]["nonce"]) == (MODULE, NONCE)
    assert set(found["matched"]) == {"PCR0", "PCR1", "PCR2"}
    assert found["root"]["development"] is False
    assert any(line.startswith("anything about now") for line in found["not_proven"])


@pytest.mark.parametrize("form", [lambda raw: raw, bytes.hex, __import__("base64").encodebytes])
def test_from_standard_input(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = form(Path("doc").read_bytes())
    feed(monkeypatch, made if isinstance(made, bytes) else made.encode())
    assert verify("-", "--eif", "app.eif") == 0


REFUSED = {
    "pcr-mismatch": ["doc", "--pcr", PCR0],
    "nonce-mismatch": ["doc", "--eif", "app.eif", "--nonce", "00" * 32],
    "instance-id-mismatch": ["doc", "--eif", "app.eif", "--instance-id", "i-00"],
    "no-reference-values": ["doc"],
    "zero-pcr": ["doc", "--pcr", "0=" + "00" * 48],
    "wrong-kind": ["doc", "--eif", "app.eif", "--kind", "nitrotpm"],
    "cbor-truncated": ["empty", "--eif", "app.eif"],
    "document": ["app.txt", "--eif", "app.eif"],
    "debug-mode": ["debug", "--any-measurement"],
    "user-data-mismatch": ["doc", "--eif", "app.eif", "--user-data", ""],
    "public-key-mismatch": ["doc", "--eif", "app.eif", "--public-key", "00"],
}


@pytest.mark.parametrize("code", REFUSED)
def test_what_is_not_verified_exits_with_3(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").write_bytes(b"")
    Path("app.txt").write_text("no document, in words")
    Path("debug").write_bytes(document(pcrs=DEBUG_PCRS))
    assert verify(*REFUSED[code], "--json") == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err)["error"]["code"] == code


def test_by_default_only_aws_is_trusted_and_only_now(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", "doc", "--any-measurement", "--at", THEN, "--json"]) == 3
    assert failure(capsys) == "untrusted-root"
    assert run_command(["verify", "doc", "--any-measurement", "--root", "root.pem", "--json"]) == 3
    assert failure(capsys) == "cert-not-valid-at"
    assert run_command(["verify", "doc", "--eif", "app.eif", "--root", "root.pem", "--at", "document"]) == 0
    assert "  that it is fresh: it was judged at its own time" in capsys.readouterr().out


def test_the_development_root_only_when_told(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = datetime.now(UTC)
    first, last = now - timedelta(hours=1), now + timedelta(hours=1)
    chain = certificates([replace(link, first=first, last=last) for link in links()])
    Path("fresh").write_bytes(document(chain, timestamp=int(now.timestamp() * 1000)))
    assert run_command(["verify", "fresh", "--pcr", PCR0, "--dev-root", "--json"]) == 4
    assert failure(capsys) == "missing"
    write_root(directory / "data/enclavekit/attestation/root.pem", chain)
    assert run_command(["verify", "fresh", "--pcr", PCR0, "--dev-root"]) == 0
    said = capsys.readouterr().out
    assert "for which a root for development vouches (" in said
    assert "  anything about hardware: whoever can read the development keys can sign what they like\n" in said
    assert run_command(["verify", "fresh", "--pcr", PCR0, "--json"]) == 3
    assert failure(capsys) == "untrusted-root"
    assert run_command(["verify", "doc", "--pcr", PCR0, "--dev-root", "--at", THEN, "--json"]) == 3
    assert failure(capsys) == "untrusted-root"


def test_debug_mode_that_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("debug").write_bytes(document(pcrs=DEBUG_PCRS))
    assert verify("debug", "--any-measurement", "--allow-debug") == 0
    assert (
        "  secrecy: in debug mode the parent reads console and memory, and no image is measured"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "words",
    [
        ["doc", "--pcr", "0=00"],
        ["doc", "--pcr", f"32={PCRS[0].hex()}"],
        ["doc", "--pcr", PCR0, "--pcr", f"0={PCRS[1].hex()}"],
        ["doc", "--eif", "app.eif", "--pcr", PCR0],
        ["doc", "--eif", "app.eif", "--any-measurement"],
        ["doc", "--any-measurement", "--nonce", "xyz"],
        ["doc", "--any-measurement", "--nonce", ""],
        ["doc", "--any-measurement", "--nonce", "00" * 1025],
        ["doc", "--any-measurement", "--max-age", "0"],
        ["doc", "--any-measurement", "--dev-root"],
        ["doc", "--inspect"],
    ],
)
def test_words_that_do_not_fit(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(*words) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["yesterday", "2026-06-01T12:00:00", ""])
def test_a_time_that_is_none(text: str) -> None:
    assert run_command(["verify", "doc", "--any-measurement", "--at", text]) == 2
    assert run_command(["verify", "doc", "--any-measurement", "--at", "document", "--max-age", "5"]) == 2


def test_files_that_are_not_there() -> None:
    assert verify("none", "--any-measurement") == 1
    assert verify("doc", "--eif", "none.eif") == 1
    assert run_command(["verify", "doc", "--any-measurement", "--root", "none.pem"]) == 1
    assert run_command(["verify", "doc", "--any-measurement", "--root", "app.eif"]) == 1


def test_inspect_says_unverified(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", "doc", "--inspect"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("UNVERIFIED  anybody can have written this\n")
    assert f"  module_id      {MODULE}\n" in said
    assert run_command(["verify", "doc", "--inspect", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["verified"], shown["document"]["instance_id"]) == (False, INSTANCE)


def test_a_short_nonce_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("doc", "--eif", "app.eif", "--nonce", "6e6e") == 3
    assert (
        "enclave: warning: --nonce: 2 bytes can be guessed, or seen again; take 16 or more\n" in capsys.readouterr().err
    )


def test_hostile_text_does_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Path("hostile").write_bytes(document(module_id="\x1b[2Jtrusted"))
    assert run_command(["verify", "hostile", "--inspect"]) == 3
    assert "\x1b" not in "".join(capsys.readouterr())


def test_kms_policy(capsys: pytest.CaptureFixture[str]) -> None:
    pcrs = Policy.from_eif("app.eif").accepted[0]
    assert run_command(["kms-policy", "app.eif"]) == 0
    captured = capsys.readouterr()
    condition = {"StringEqualsIgnoreCase": {"kms:RecipientAttestation:ImageSha384": pcrs[0].hex()}}
    assert json.loads(captured.out) == {"Condition": condition}
    assert captured.err == "enclave: whoever may call kms:PutKeyPolicy on the key can take this condition away\n"
    role = "arn:aws:iam::111122223333:role/parent"
    words = ["--pcrs", "0,2", "--instance-id", INSTANCE, "--role", role, "--pcr", f"16={'07' * 48}"]
    assert run_command(["kms-policy", "app.eif", *words, "-q", "--json"]) == 0
    captured = capsys.readouterr()
    keys = json.loads(captured.out)["Condition"]["StringEqualsIgnoreCase"]
    prefix = "kms:RecipientAttestation:"
    assert set(keys) == {f"{prefix}{name}" for name in ("ImageSha384", "PCR2", "PCR3", "PCR4", "PCR16")}
    assert keys[f"{prefix}PCR4"] == PCRS[4].hex()
    assert captured.err == ""


def test_kms_policy_of_several_builds(capsys: pytest.CaptureFixture[str]) -> None:
    Path("next.eif").write_bytes(image("kcm012"))
    assert run_command(["kms-policy", "app.eif", "next.eif", "--pcrs", "0,1"]) == 0
    keys = json.loads(capsys.readouterr().out)["Condition"]["StringEqualsIgnoreCase"]
    assert len(keys["kms:RecipientAttestation:ImageSha384"]) == 2
    assert isinstance(keys["kms:RecipientAttestation:PCR1"], str)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["app.eif", "--pcrs", "x"], 2),
        (["app.eif", "--pcrs", "32"], 2),
        (["app.eif", "--role", "parent"], 2),
        (["app.eif", "--instance-id", "../i-0"], 2),
        (["app.eif", "--pcr", f"16={'00' * 48}"], 3),
        (["app.eif", "--pcrs", "8"], 3),
        (["none.eif"], 1),
    ],
)
def test_kms_policy_that_would_protect_nothing(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["kms-policy", *words]) == code
    assert capsys.readouterr().out == ""
