# SPDX-License-Identifier: Apache-2.0
"""nitro-cli's commands: the same objects, key order and exit codes."""

from __future__ import annotations

import io
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from enclavekit import eif
from enclavekit.cli import main as enclave
from enclavekit.eif import Arch, BytesContent, Metadata, Section, SectionType
from enclavekit.nitro_cli.codes import Code
from enclavekit.nitro_cli.main import run_command
from enclavekit.signing.certificate import self_signed
from enclavekit.signing.pem import PemSigner

BUILD = eif.BuildInfo("2026-01-02T03:04:05.123456789+00:00", "nitro-cli", "1.5.0", "Linux", "4.14.256")


@pytest.fixture(autouse=True)
def _away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def image(metadata: Metadata | bytes | None = None) -> bytes:
    data = metadata if isinstance(metadata, bytes) else (metadata or Metadata("hello", "v1", BUILD)).encode()
    parts = [
        (SectionType.KERNEL, b"kernel"),
        (SectionType.CMDLINE, b"quiet"),
        (SectionType.METADATA, data),
        (SectionType.RAMDISK, b"boot"),
        (SectionType.RAMDISK, b"application"),
    ]
    out = io.BytesIO()
    eif.write(out, [Section(kind, BytesContent(content)) for kind, content in parts], arch=Arch.X86_64)
    return out.getvalue()


@pytest.fixture
def pair(tmp_path: Path) -> PemSigner:
    from datetime import UTC, datetime

    signer = PemSigner.generate("P-384")
    (tmp_path / "k.pem").write_bytes(signer.pem())
    made = self_signed(signer, common_name="me", first=datetime(2026, 1, 5, tzinfo=UTC), days=10)
    (tmp_path / "c.pem").write_bytes(made.pem)
    return signer


def result(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Any, str]:
    """The object that a command prints, in the form that it has to have, and what it says beside it."""
    capsys.readouterr()
    assert run_command(list(words)) == 0
    captured = capsys.readouterr()
    made = json.loads(captured.out)
    assert captured.out == json.dumps(made, indent=2, ensure_ascii=False) + "\n"
    return made, captured.err


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The exit code, and the first line."""
    capsys.readouterr()
    code = run_command(list(words))
    captured = capsys.readouterr()
    assert captured.out == ""
    first, *rest = captured.err.splitlines()
    if code > 2:
        assert first.startswith(f"[ E{code} ] ")
        assert rest == ["", f"For more details, please visit {LINK}#E{code}"]
    return code, first


LINK = "https://docs.aws.amazon.com/enclaves/latest/user/cli-errors.html"


def test_describe_an_unsigned_image(capsys: pytest.CaptureFixture[str]) -> None:
    info = {"b": [{"z": 1, "a": None}], "a": "ü"}
    Path("a.eif").write_bytes(image(Metadata("hello", "v1", BUILD, info, {"zeta": 1, "alpha": {"y": 2, "x": 1}})))
    made, said = result(capsys, "describe-eif", "--eif-path", "a.eif")
    assert said == ""
    assert list(made) == ["EifVersion", "Measurements", "IsSigned", "CheckCRC", "ImageName", "ImageVersion", "Metadata"]
    assert list(made["Measurements"]) == ["HashAlgorithm", "PCR0", "PCR1", "PCR2"]
    assert made["Measurements"]["HashAlgorithm"] == "Sha512_48 { .. }"
    assert (made["EifVersion"], made["IsSigned"], made["CheckCRC"]) == (4, False, True)
    assert json.dumps(made["Metadata"]) == json.dumps(
        {
            "BuildTime": "2026-01-02T03:04:05.123456789+00:00",
            "BuildTool": "nitro-cli",
            "BuildToolVersion": "1.5.0",
            "OperatingSystem": "Linux",
            "KernelVersion": "4.14.256",
            "DockerInfo": {"a": "ü", "b": [{"a": None, "z": 1}]},
            "alpha": {"x": 1, "y": 2},
            "zeta": 1,
        }
    )


def test_sign_and_describe(pair: PemSigner, capsys: pytest.CaptureFixture[str]) -> None:
    assert pair
    Path("a.eif").write_bytes(image())
    words = ("sign-eif", "--eif-path", "a.eif", "--signing-certificate", "c.pem", "--private-key", "k.pem")
    made, said = result(capsys, *words)
    assert said == "Enclave Image successfully signed.\n"
    assert list(made) == ["Measurements"]
    assert list(made["Measurements"]) == ["HashAlgorithm", "PCR0", "PCR1", "PCR2", "PCR8"]
    described, _ = result(capsys, "describe-eif", "--eif-path", "a.eif")
    assert list(described) == [
        *("EifVersion", "Measurements", "IsSigned", "SigningCertificate", "CheckCRC", "SignatureCheck"),
        *("ImageName", "ImageVersion", "Metadata"),
    ]
    assert described["Measurements"] == made["Measurements"]
    certificate = described["SigningCertificate"]
    assert list(certificate) == ["IssuerName", "Algorithm", "NotBefore", "NotAfter", "Signature"]
    assert certificate["NotBefore"] == "Jan  5 00:00:00 2026 GMT"
    assert (described["IsSigned"], described["SignatureCheck"]) == (True, True)  # an expired certificate is no matter
    # nitro-cli signs an image that is signed already, too
    again, _ = result(capsys, *words)
    assert again == made
    assert result(capsys, "pcr", "--signing-certificate", "c.pem")[0] == {"PCR8": made["Measurements"]["PCR8"]}


def test_pcr_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("nothing").write_bytes(b"")
    assert result(capsys, "pcr", "--input", "nothing")[0] == {
        "PCR": "21b9efbc184807662e966d34f390821309eeac6802309798826296bf3e8bec7c10edb30948c90ba67310f7b964fc500a"
    }


def crc_mended(data: bytes) -> bytes:
    return data[:544] + zlib.crc32(data[548:], zlib.crc32(data[:544])).to_bytes(4, "big") + data[548:]


def test_signed_for_another_image(pair: PemSigner, capsys: pytest.CaptureFixture[str]) -> None:
    """A signature that holds, but is over another PCR0, is told; one that does not hold is an error."""
    assert pair
    Path("a.eif").write_bytes(image())
    result(capsys, "sign-eif", "--eif-path", "a.eif", "--signing-certificate", "c.pem", "--private-key", "k.pem")
    data = Path("a.eif").read_bytes()
    Path("a.eif").write_bytes(crc_mended(data.replace(b"application", b"APPLICATION")))
    assert result(capsys, "describe-eif", "--eif-path", "a.eif")[0]["SignatureCheck"] is False
    Path("a.eif").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert failure(capsys, "describe-eif", "--eif-path", "a.eif")[0] == 35


def test_a_wrong_crc_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    data = image()
    Path("a.eif").write_bytes(data[:544] + b"\0\0\0\0" + data[548:])
    assert result(capsys, "describe-eif", "--eif-path", "a.eif")[0]["CheckCRC"] is False


@pytest.mark.parametrize("metadata", [b"{}", b"[]", b"\xff", b'{"ImageName": 5}', b"[" * 5000])
def test_metadata_that_nitro_cli_cannot_read(metadata: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.eif").write_bytes(image(metadata))
    assert failure(capsys, "describe-eif", "--eif-path", "a.eif")[0] == 35


def test_metadata_that_are_null_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.eif").write_bytes(image(b"null"))
    assert list(result(capsys, "describe-eif", "--eif-path", "a.eif")[0]) == [
        *("EifVersion", "Measurements", "IsSigned", "CheckCRC"),
    ]


def test_custom_metadata_that_are_no_object(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.eif").write_bytes(image(Metadata("hello", "v1", BUILD, None, ["list"])))
    code, line = failure(capsys, "describe-eif", "--eif-path", "a.eif")
    assert code == 17
    assert line.endswith(" a.eif: custom metadata are list, expected an object")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["describe-eif", "--eif-path", "none"], 35),
        (["describe-eif", "--eif-path", "junk"], 35),
        (["describe-eif"], 2),
        (["describe-eif", "junk"], 2),
        (["pcr"], 2),
        (["pcr", "--input", "junk", "--signing-certificate", "junk"], 2),
        (["pcr", "--input", "none"], 19),
        (["pcr", "--signing-certificate", "none"], 19),
        (["pcr", "--signing-certificate", "junk"], 57),
        (["sign-eif", "--signing-certificate", "junk", "--private-key", "junk"], 1),
        (["sign-eif", "--eif-path", "junk", "--private-key", "junk"], 2),
        (["sign-eif", "--eif-path", "junk"], 60),
        (["sign-eif", "--eif-path", "junk", "--signing-certificate", "junk", "--private-key", "junk"], 60),
        (["sign-eif", "--eif-path", "junk", "--signing-certificate", "none", "--private-key", "none"], 60),
        (["explain"], 2),
        (["fly"], 2),
        ([], 2),
    ],
)
def test_exit_codes(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    Path("junk").write_bytes(b"junk\x1b[31m" * 100)
    assert failure(capsys, *words)[0] == code
    assert Path("junk").read_bytes() == b"junk\x1b[31m" * 100


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["explain", "--error-code", "E26"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "The memory asked for is too little: it has to be four times the image's size."
        " Ask for more memory, or make the image smaller.\n"
    )
    assert run_command(["explain", "--error-code", "E99"]) == 0
    assert capsys.readouterr().err == "No such error code E99\n"
    assert [code.number for code in Code] == list(range(61))
    assert all(Code.find(str(code)) is code for code in Code)


def test_by_another_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A symlink to ``enclave`` that is called nitro-cli, and the subcommand."""
    Path("nothing").write_bytes(b"")
    outputs = []
    for argv in (
        ["/usr/local/bin/nitro-cli", "pcr", "--input", "nothing"],
        ["enclave", "nitro-cli", "pcr", "--input", "nothing"],
    ):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as caught:
            enclave.main()
        assert caught.value.code == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != ""
