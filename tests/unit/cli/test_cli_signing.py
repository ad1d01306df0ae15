# SPDX-License-Identifier: Apache-2.0
"""keygen, sign and resign on the command line: what they make, what they refuse, and that they leave nothing behind."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from enclavekit.cli.main import run_command
from enclavekit.eif import Arch, BytesContent, Section, SectionType, describe, inspect, write


@pytest.fixture(autouse=True)
def _away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENCLAVEKIT_KEY_PASSWORD", "ENCLAVEKIT_PIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def image(version: int = 4) -> bytes:
    parts = [(SectionType.KERNEL, b"kernel"), (SectionType.CMDLINE, b"quiet"), (SectionType.RAMDISK, b"ramdisk")]
    if version == 4:
        parts.insert(2, (SectionType.METADATA, b"{}"))
    out = io.BytesIO()
    write(out, [Section(kind, BytesContent(data)) for kind, data in parts], arch=Arch.X86_64, version=version)
    return out.getvalue()


@pytest.fixture
def pair(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """A key and its certificate, as options."""
    assert run_command(["keygen", "--cert", "c.pem", "--key", "k.pem"]) == 0
    Path("a.eif").write_bytes(image())
    capsys.readouterr()
    return ["--sign-cert", "c.pem", "--sign-key", "k.pem"]


def failure(capsys: pytest.CaptureFixture[str], *words: str, code: int = 1) -> tuple[str, str]:
    """Code and message of the error; no file is changed or made."""

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path().iterdir()}

    before = files()
    capsys.readouterr()
    assert run_command([*words, "--json"]) == code
    assert files() == before
    captured = capsys.readouterr()
    assert captured.out == ""
    error = json.loads(captured.err.splitlines()[-1])["error"]
    return error["code"], error["message"]


def described(path: str = "a.eif") -> dict[str, Any]:
    return describe(Path(path), strict=True)


def test_keygen_sign_describe(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = described()
    assert run_command(["sign", "a.eif", *pair, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    after = described()
    assert after["SignatureCheck"] is True
    assert result == {"Measurements": after["Measurements"]}
    assert before["Measurements"].items() < after["Measurements"].items()
    assert run_command(["pcr", "--cert", "c.pem"]) == 0
    assert capsys.readouterr().out.strip() == after["Measurements"]["PCR8"]


def test_keys_are_private(pair: list[str]) -> None:
    assert pair
    assert stat.S_IMODE(Path("k.pem").stat().st_mode) == 0o600


@pytest.mark.parametrize("curve", ["P-256", "P-384", "P-521"])
def test_keygen_says_what_it_made(curve: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["keygen", "--cert", "c.pem", "--key", "k.pem", "--curve", curve, "--days", "3", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert list(made) == ["schema", "Key", "Certificate", "Algorithm", "NotAfter", "PCR8"]
    assert made["Algorithm"] == {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}[curve]


def test_keygen_refuses(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert pair
    both = ("keygen", "--cert", "new.pem", "--key", "k.pem")
    assert failure(capsys, *both) == ("file", "k.pem: exists already, and is left alone")
    assert failure(capsys, "keygen", "--cert", "new.pem", code=2)[1] == (
        "expected --key for a new key or --from for one that exists"
    )
    assert failure(capsys, "keygen", "--cert", "n", "--from", "k.pem", "--curve", "P-256", code=2)[1] == (
        "--curve is for a new key; one that exists has its own"
    )
    assert failure(capsys, "keygen", "--cert", "n", "--key", "none/k.pem") == (
        "file",
        "cannot write none/k.pem: no such file or directory",
    )
    assert failure(capsys, "keygen", "--cert", "n", "--key", "m", "--days", "0", code=2)[1] == (
        "0 days: expected 1 to 36500"
    )


def test_a_certificate_for_a_key_that_exists(pair: list[str]) -> None:
    assert run_command(["keygen", "--cert", "other.pem", "--from", "k.pem", "--name", "other"]) == 0
    assert run_command(["sign", "a.eif", "--sign-cert", "other.pem", *pair[2:]]) == 0
    assert described()["SigningCertificate"]["IssuerName"] == {"commonName": "other"}


def test_a_key_with_a_password(
    pair: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pair
    monkeypatch.setenv("ENCLAVEKIT_KEY_PASSWORD", "secret")
    assert run_command(["keygen", "--cert", "pc.pem", "--key", "pk.pem"]) == 0
    assert "ENCRYPTED" in Path("pk.pem").read_text()
    words = ("sign", "a.eif", "--sign-cert", "pc.pem", "--sign-key", "pk.pem")
    monkeypatch.delenv("ENCLAVEKIT_KEY_PASSWORD")
    assert failure(capsys, *words) == ("signing", "pk.pem: the key is encrypted, and no password was given")
    monkeypatch.setenv("ENCLAVEKIT_KEY_PASSWORD", "secret")
    assert run_command(list(words)) == 0
    assert described()["IsSigned"] is True


def test_sign_to_another_file(pair: list[str]) -> None:
    before = Path("a.eif").read_bytes()
    assert run_command(["sign", "a.eif", *pair, "-o", "b.eif"]) == 0
    assert Path("a.eif").read_bytes() == before
    assert described("b.eif")["IsSigned"] is True


def test_signed_and_not_signed(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(capsys, "resign", "a.eif", *pair) == ("signing", "the image is not signed yet")
    assert run_command(["sign", "a.eif", *pair]) == 0
    assert failure(capsys, "sign", "a.eif", *pair) == ("signing", "the image is signed already")
    first = Path("a.eif").read_bytes()
    assert run_command(["resign", "a.eif", *pair]) == 0
    assert Path("a.eif").read_bytes() != first
    assert described()["Sections"][:4] == [
        {"Type": one.kind, "Offset": one.offset, "Size": one.size} for one in inspect(io.BytesIO(first)).sections[:4]
    ]
    assert len(described()["Sections"]) == 5


def test_resign_mends_sizes_that_others_left(pair: list[str]) -> None:
    """Upstream leaves the table's old size when it replaces a signature by one of another length."""
    import zlib

    assert run_command(["sign", "a.eif", *pair]) == 0
    data = bytearray(Path("a.eif").read_bytes())
    data[0x11C + 8 * 4 + 7] ^= 3
    data[544:548] = zlib.crc32(data[548:], zlib.crc32(data[:544])).to_bytes(4, "big")
    Path("a.eif").write_bytes(data)
    assert [remark.rule for remark in inspect(io.BytesIO(bytes(data))).remarks] == ["sizes"]
    assert run_command(["resign", "a.eif", *pair]) == 0
    assert len(described()["Warnings"]) == 1  # the metadata, which are {}


def test_flags_and_reserved_fields_are_kept(pair: list[str]) -> None:
    import zlib

    data = bytearray(image())
    data[6:8], data[0x18:0x1A], data[0x21C:0x220] = b"\x02\x41", b"\0\7", b"\0\0\0\x09"
    data += b"tail"
    data[544:548] = zlib.crc32(data[548:], zlib.crc32(data[:544])).to_bytes(4, "big")
    Path("a.eif").write_bytes(data)
    assert run_command(["sign", "a.eif", *pair]) == 0
    header = inspect(io.BytesIO(Path("a.eif").read_bytes())).header
    assert (header.flags, header.reserved, header.unused) == (0x241, 7, 9)
    assert described()["Warnings"][:2] == [
        "unknown header flags 0x0240",
        "reserved header fields 0x0007 and 0x00000009, expected 0",
    ]


def test_images_that_are_not_signed(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("old.eif").write_bytes(image(2))
    assert failure(capsys, "sign", "old.eif", *pair) == (
        "eif",
        "old.eif: EIF sections: signature in version 2, expected version 3 or later",
    )
    broken = bytearray(image())
    broken[-1] ^= 1
    Path("broken.eif").write_bytes(broken)
    code, message = failure(capsys, "sign", "broken.eif", *pair)
    assert code == "eif"
    assert message.startswith("broken.eif: the CRC is 0x")
    assert message.endswith(": the image is damaged")
    Path("short.eif").write_bytes(image()[:-3])
    assert failure(capsys, "sign", "short.eif", *pair) == (
        "eif",
        f"short.eif: section 3: ramdisk ends at 0x{len(image()):x}, the file ends at 0x{len(image()) - 3:x}:"
        " such an image does not boot, and is not signed",
    )


def test_words_that_do_not_fit(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(capsys, "sign", "a.eif", code=2)[1] == "missing option '--sign-cert'"
    one_of = "expected one of --sign-key, --digest-out and --signature-in"
    assert failure(capsys, "sign", "a.eif", *pair[:2], code=2)[1] == one_of
    assert failure(capsys, "sign", "a.eif", *pair, "--digest-out", "d", code=2)[1] == one_of
    assert failure(capsys, "sign", "a.eif", *pair[:2], "--digest-out", "d", "-o", "x", code=2)[1] == (
        "--digest-out writes no image, so there is no place for --output"
    )


def test_another_key(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["keygen", "--cert", "c2.pem", "--key", "k2.pem"]) == 0
    assert failure(capsys, "sign", "a.eif", *pair[:2], "--sign-key", "k2.pem") == (
        "signing",
        "the key does not belong to the certificate",
    )


def test_detached(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["sign", "a.eif", *pair[:2], "--digest-out", "digest", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["Digest"] == Path("digest").read_bytes().hex()
    assert (result["Algorithm"], result["HashAlgorithm"]) == ("ES384", "sha384")
    subprocess.run(["openssl", "pkeyutl", "-sign", "-inkey", "k.pem", "-in", "digest", "-out", "der"], check=True)
    assert run_command(["sign", "a.eif", *pair[:2], "--signature-in", "der"]) == 0
    assert described()["SignatureCheck"] is True
    Path("b.eif").write_bytes(image().replace(b"quiet", b"loud!"))
    code, _ = failure(capsys, "sign", "b.eif", *pair[:2], "--signature-in", "der")
    assert code == "eif"  # its CRC; and with that mended, the signature is of another image
    Path("der").write_bytes(b"\0" * 72)
    assert failure(capsys, "resign", "a.eif", *pair[:2], "--signature-in", "der")[0] == "signature"


def test_expired_certificates_warn(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["keygen", "--cert", "short.pem", "--from", "k.pem", "--days", "5"]) == 0
    capsys.readouterr()
    assert run_command(["sign", "a.eif", "--sign-cert", "short.pem", *pair[2:]]) == 0
    assert "; after it the enclave will not start\n" in capsys.readouterr().err
    assert run_command(["describe", "a.eif"]) == 0
    assert "expires on" in capsys.readouterr().out


def test_certificates_that_are_none(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(capsys, "sign", "a.eif", "--sign-cert", "k.pem", *pair[2:]) == (
        "certificate",
        "k.pem: certificate: no certificate in PEM",
    )
    assert failure(capsys, "pcr", "--cert", "k.pem") == ("certificate", "k.pem: certificate: no certificate in PEM")
    assert failure(capsys, "pcr", "--cert", "none") == ("file", "cannot read none: no such file or directory")


def test_names_do_not_play_with_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["keygen", "--cert", "c\x1b[31m", "--key", "k\udcff"]) == 0
    words = ["--sign-cert", "c\x1b[31m", "--sign-key", "k\udcff"]
    Path("a\x1b.eif").write_bytes(image())
    assert run_command(["sign", "a\x1b.eif", *words[:2], "--digest-out", "d\x1b"]) == 0
    assert run_command(["sign", "a\x1b.eif", *words]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "a\\x1b.eif: signed" in said.out


@pytest.mark.parametrize("words", [["describe"], ["pcr"], ["lint"], ["nitro-cli", "describe-eif", "--eif-path"]])
def test_fifos_hold_nobody_up(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("fifo")
    assert run_command([*words, "fifo"]) in (1, 35)
    assert "cannot read fifo: not an ordinary file" in capsys.readouterr().err


def test_a_closed_stdout(pair: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert pair
    monkeypatch.setattr("sys.stdout", None)
    for words in (["describe", "a.eif"], ["describe", "a.eif", "--json"], ["lint", "a.eif"], ["pcr", "a.eif"]):
        assert run_command(words) in (0, 3)
