# SPDX-License-Identifier: Apache-2.0
"""Keys in AWS KMS: a simulated service, and what the service can refuse."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from enclavekit.eif import sign
from enclavekit.errors import SigningError
from enclavekit.signing.certificate import self_signed
from enclavekit.signing.pem import PemSigner
from enclavekit.signing.signer import KeyReference, open_signer

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto")

REGION = "eu-west-1"
PCR0 = bytes(range(48))


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A KMS that has no keys yet, and credentials for it that are nobody's."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_SESSION_TOKEN", "testing"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    with moto.mock_aws():
        yield boto3.client("kms", region_name=REGION)


def key(service: Any, spec: str, usage: str = "SIGN_VERIFY") -> str:
    arn: str = service.create_key(KeySpec=spec, KeyUsage=usage)["KeyMetadata"]["Arn"]
    return arn


def refusal(arn: str) -> SigningError:
    with pytest.raises(SigningError) as caught, open_signer(KeyReference(arn)):
        pass
    return caught.value


class FakeKms:
    """A key, and the two calls, as the service's reference describes them: moto signs no digests."""

    def __init__(self, arn: str, curve: str) -> None:
        self.arn = arn
        self.key = PemSigner.generate(curve)
        self.asked: list[str] = []

    def get_public_key(self, *, KeyId: str) -> dict[str, Any]:  # noqa: N803
        self.asked.append(KeyId)
        der = self.key.public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return {"KeyId": KeyId, "KeyUsage": "SIGN_VERIFY", "PublicKey": der}

    def sign(self, *, KeyId: str, Message: bytes, MessageType: str, SigningAlgorithm: str) -> dict[str, Any]:  # noqa: N803
        self.asked.append(KeyId)
        assert MessageType == "DIGEST"
        assert SigningAlgorithm == f"ECDSA_SHA_{8 * len(Message)}"
        return {"KeyId": KeyId, "Signature": self.key.sign_digest(Message), "SigningAlgorithm": SigningAlgorithm}


@pytest.mark.parametrize("curve", ["P-256", "P-384", "P-521"])
def test_certified_and_signed(curve: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arn = f"arn:aws-us-gov:kms:us-gov-west-1:123456789012:key/{curve}"
    fake = FakeKms(arn, curve)
    regions = []

    def client(name: str, *, region_name: str, **_: Any) -> FakeKms:
        regions.append((name, region_name))
        return fake

    monkeypatch.setattr(boto3, "client", client)
    with open_signer(KeyReference(arn)) as signer:
        certificate = self_signed(signer, common_name="x", first=datetime(2026, 1, 1, tzinfo=UTC), days=1)
        sign(PCR0, certificate, signer).verify(PCR0)
    assert regions == [("kms", "us-gov-west-1")]
    assert fake.asked == [arn, arn, arn]  # the whole ARN, not the key's id


def test_what_goes_over_the_wire(service: Any) -> None:
    """As far as moto answers: it gives the public key, and a signature that is over something else."""
    with open_signer(KeyReference(key(service, "ECC_NIST_P384"))) as signer:
        assert signer.public_key.curve.name == "secp384r1"
        assert signer.sign_digest(PCR0)[0] == 0x30
        with pytest.raises(SigningError) as caught:
            self_signed(signer, common_name="x", first=datetime(2026, 1, 1, tzinfo=UTC), days=1)
    assert caught.value.message == "the key gave a signature that does not hold"


def test_no_such_key() -> None:
    arn = f"arn:aws:kms:{REGION}:123456789012:key/00000000-0000-0000-0000-000000000000"
    error = refusal(arn)
    assert error.message.startswith(f"{arn}: KMS refused: NotFoundException: ")
    assert error.hint == "no such key in that account and region"


@pytest.mark.parametrize("spec", ["RSA_2048", "ECC_SECG_P256K1"])
def test_keys_of_other_kinds(service: Any, spec: str) -> None:
    arn = key(service, spec)
    assert refusal(arn).message == (f"{arn}: not an EC key on P-256, P-384 or P-521 (ECC_NIST_P256, _P384, _P521)")


def test_answers_that_are_none(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        answer: dict[str, Any]

        def get_public_key(self, **_: Any) -> dict[str, Any]:
            return self.answer

        def sign(self, **_: Any) -> dict[str, Any]:
            return {}

    client = Client()
    monkeypatch.setattr(boto3, "client", lambda *_, **__: client)
    arn = f"arn:aws:kms:{REGION}:123456789012:key/x"
    client.answer = {"KeyUsage": "ENCRYPT_DECRYPT"}
    assert refusal(arn).message == f"{arn}: a key for ENCRYPT_DECRYPT, expected SIGN_VERIFY"
    client.answer = {"KeyUsage": "SIGN_VERIFY", "PublicKey": b"nonsense"}
    assert refusal(arn).message == f"{arn}: KMS gave a public key that cannot be read"
    client.answer = service.get_public_key(KeyId=key(service, "ECC_NIST_P256"))
    with open_signer(KeyReference(arn)) as signer, pytest.raises(SigningError) as caught:
        signer.sign_digest(bytes(32))
    assert caught.value.message == f"{arn}: KMS gave no signature"


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import NoCredentialsError

    class Client:
        def get_public_key(self, **_: Any) -> Any:
            raise NoCredentialsError

    monkeypatch.setattr(boto3, "client", lambda *_, **__: Client())
    arn = f"arn:aws:kms:{REGION}:123456789012:key/x"
    error = refusal(arn)
    assert error.message == f"{arn}: unable to locate credentials"
    assert error.hint == "set AWS_PROFILE, or what else the AWS tools take"
