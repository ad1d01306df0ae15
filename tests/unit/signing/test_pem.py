# SPDX-License-Identifier: Apache-2.0
"""Keys in PEM files, and what stands for a key on the command line; OpenSSL makes the files."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from enclavekit.errors import Error, FileError, SigningError, UsageError
from enclavekit.signing.certificate import self_signed
from enclavekit.signing.pem import HASHES, PemSigner
from enclavekit.signing.signer import KeyReference, open_signer

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
OPENSSL_CURVES = {"P-256": "prime256v1", "P-384": "secp384r1", "P-521": "secp521r1"}


def openssl(*words: str | Path) -> bytes:
    return subprocess.run(["openssl", *words], capture_output=True, check=True).stdout


def refusal(kind: type[Error], words: str, password: str | None = None) -> str:
    with pytest.raises(kind) as caught, open_signer(KeyReference(words, password=password)):
        pass
    assert type(caught.value) is kind
    return caught.value.message


@pytest.mark.parametrize("curve", OPENSSL_CURVES)
@pytest.mark.parametrize("form", ["SEC1", "PKCS#8"])
def test_keys_of_openssl(curve: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(openssl("ecparam", "-name", OPENSSL_CURVES[curve], "-genkey", "-noout"))
    if form == "PKCS#8":
        path.write_bytes(openssl("pkcs8", "-topk8", "-nocrypt", "-in", path))
    with open_signer(KeyReference(str(path))) as signer:
        hashing = HASHES[signer.public_key.curve.name]
        digest = bytes(range(hashing.digest_size))
        der = signer.sign_digest(digest)
        signer.public_key.verify(der, digest, ec.ECDSA(Prehashed(hashing)))


def test_an_encrypted_key(tmp_path: Path) -> None:
    path = str(tmp_path / "key.pem")
    made = PemSigner.generate("P-384")
    Path(path).write_bytes(made.pem("secret"))
    assert PemSigner.open(path, "secret").public_key == made.public_key
    assert refusal(SigningError, path) == f"{path}: the key is encrypted, and no password was given"
    assert refusal(SigningError, path, "wrong") == f"{path}: no private key that this password opens"
    Path(path).write_bytes(made.pem())
    assert refusal(SigningError, path, "secret") == f"{path}: the key is not encrypted, and a password was given"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["genrsa", "1024"], "a key of kind RSA, expected EC on P-256, P-384 or P-521"),
        (["genpkey", "-algorithm", "ed25519"], "a key of kind Ed25519, expected EC on P-256, P-384 or P-521"),
        (
            ["ecparam", "-name", "secp256k1", "-genkey", "-noout"],
            "a key on secp256k1, expected P-256, P-384 or P-521",
        ),
        (["rand", "-base64", "100"], "no private key in PEM"),
    ],
)
def test_other_keys_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(openssl(*words))
    assert refusal(SigningError, str(path)) == f"{path}: {message}"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = f"{tmp_path}/none"
    assert refusal(FileError, path) == f"cannot read {path}: no such file or directory"


@pytest.mark.parametrize(
    "arn",
    [
        "arn:aws:kms:eu-west-1:111122223333:alias/name",
        "arn:aws:iam::111122223333:role/x",
        "arn:aws:kms:eu-west-1:11112222333:key/x",
        "arn:azure:kms:eu-west-1:111122223333:key/x",
    ],
)
def test_arns_of_something_else(arn: str) -> None:
    assert refusal(SigningError, arn) == f"{arn}: no ARN of a KMS key"


def test_a_reference_does_not_show_its_secrets() -> None:
    assert repr(KeyReference("key.pem", "module", "1234", "5678")) == "KeyReference('key.pem')"


@pytest.mark.parametrize("curve", OPENSSL_CURVES)
def test_a_certificate_that_openssl_takes(curve: str, tmp_path: Path) -> None:
    signer = PemSigner.generate(curve)
    made = self_signed(signer, common_name="my key", first=FIRST, days=30)
    made.check_key(signer.public_key)
    (tmp_path / "c.pem").write_bytes(made.pem)
    known = openssl("x509", "-in", tmp_path / "c.pem", "-noout", "-subject", "-issuer", "-enddate", "-purpose").decode()
    assert "subject=CN = my key\nissuer=CN = my key\nnotAfter=Jan 31 00:00:00 2026 GMT\n" in known
    when = str(int(FIRST.timestamp()) + 60)
    openssl("verify", "-attime", when, "-CAfile", tmp_path / "c.pem", tmp_path / "c.pem")


class Stranger:
    """Says that it has one key, and signs with another."""

    public_key = PemSigner.generate("P-256").public_key

    def sign_digest(self, digest: bytes) -> bytes:
        return PemSigner.generate("P-256").sign_digest(digest)


def test_certificates_that_cannot_be() -> None:
    signer = PemSigner.generate("P-256")
    for days in (0, -1, 36501):
        with pytest.raises(UsageError) as caught:
            self_signed(signer, common_name="x", first=FIRST, days=days)
        assert caught.value.message == f"{days} days: expected 1 to 36500"
    for name in ("", "x" * 65):
        with pytest.raises(UsageError) as caught:
            self_signed(signer, common_name=name, first=FIRST, days=1)
        assert caught.value.message == f"name of {len(name)} characters: expected 1 to 64"
    with pytest.raises(SigningError) as broken:
        self_signed(Stranger(), common_name="x", first=FIRST, days=1)
    assert broken.value.message == "the key gave a signature that does not hold"
