# SPDX-License-Identifier: Apache-2.0
"""The signature section: made, read in every form that is around, verified; upstream's golden bytes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from eif_images import PCR0
from signing_keys import NOW, MemoryKey, certificate, certificate_pem, key

from enclavekit.codec.cose import Sign1
from enclavekit.eif import Signature, SigningCertificate, sign, signed, unsigned
from enclavekit.errors import CertificateError, EifError, Error, FormatError, SignatureError, SigningError

OF = bytes.fromhex(PCR0)
CURVES = ("P-256", "P-384", "P-521")


def refusal(kind: type[Error], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return caught.value.message


def test_golden_payload() -> None:
    """Of the format's own tests (src/utils/cbor.rs)."""
    assert unsigned(bytes(range(48)), certificate()).payload.hex() == (
        "a26e72656769737465725f696e646578006e72656769737465725f76616c75659830000102030405060708090a0b0c0d0e0f101112131415"
        "161718181819181a181b181c181d181e181f1820182118221823182418251826182718281829182a182b182c182d182e182f"
    )


def test_golden_section() -> None:
    """Of the format's own tests; their signature has a tag, which is not written any more."""
    pem = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
    golden = (
        "81a2737369676e696e675f6365727469666963617465983b182d182d182d182d182d1842184518471849184e18201843184518521854184918"
        "4618491843184118541845182d182d182d182d182d0a184d1849184918420a182d182d182d182d182d1845184e184418201843184518521854"
        "1849184618491843184118541845182d182d182d182d182d0a697369676e61747572658a18d21884184418a1011838182218a018401840"
    )
    read = Signature.parse(bytes.fromhex(golden))
    assert read.certificate.pem == pem
    assert read.cose == Sign1(bytes.fromhex("a1013822"), b"", b"")
    # The same with the tag put back: all else is written as theirs.
    untagged = golden.replace("8a18d2", "89")
    assert bytes(read).hex() == untagged
    assert Signature.parse(bytes.fromhex(untagged)).canonical
    assert not read.canonical


@pytest.mark.parametrize("curve", CURVES)
def test_made_and_verified(curve: str) -> None:
    made = sign(OF, certificate(curve), key(curve))
    assert made.canonical
    read = Signature.parse(bytes(made))
    assert read == made
    assert read.pcr0 == OF
    read.verify(OF, NOW)


def test_another_pcr0() -> None:
    made = sign(OF, certificate(), key())
    message = refusal(SignatureError, lambda: made.verify(bytes(48)))
    assert message == f"signature: for an image with PCR0 {PCR0[:16]}..., this one's is 0000000000000000..."


def test_another_key() -> None:
    assert (
        refusal(SigningError, lambda: sign(OF, certificate(), key("P-384", 1)))
        == "the key does not belong to the certificate"
    )
    other = replace(sign(OF, certificate(), key()), certificate=certificate("P-384", 1))
    message = refusal(SignatureError, lambda: other.verify(OF))
    assert message == "signature: the signature is not by this key, or not over these bytes"
    other = replace(sign(OF, certificate(), key()), certificate=certificate("P-256"))
    message = refusal(SignatureError, lambda: other.verify(OF))
    assert message == "signature: ES384 by a key on secp256r1, expected secp384r1"


class Liar:
    """A key that signs something else."""

    public_key = key().public_key

    def sign_digest(self, digest: bytes) -> bytes:
        return key().sign_digest(digest[::-1])


def test_a_signer_is_not_believed() -> None:
    assert refusal(SigningError, lambda: sign(OF, certificate(), Liar())) == (
        "the key gave a signature that does not hold:"
        " signature: the signature is not by this key, or not over these bytes"
    )


@pytest.mark.parametrize("curve", CURVES)
def test_detached_by_openssl(curve: str, tmp_path: Path) -> None:
    """The digest goes out, openssl signs it, the signature comes back, in DER."""
    digest = unsigned(OF, certificate(curve)).digest("x")
    (tmp_path / "digest").write_bytes(digest)
    (tmp_path / "key.pem").write_bytes(key(curve).pem)
    der = subprocess.run(
        ["openssl", "pkeyutl", "-sign", "-inkey", tmp_path / "key.pem", "-in", tmp_path / "digest"],
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    made = signed(OF, certificate(curve), der)
    made.verify(OF)
    assert signed(OF, certificate(curve), made.cose.signature) == made  # or as R and S
    assert refusal(SignatureError, lambda: signed(bytes(48), certificate(curve), der)) == (
        "signature: the signature is not by this key, or not over these bytes"
    )
    assert refusal(SignatureError, lambda: signed(OF, certificate(curve), b"nonsense")).startswith(
        "signature: not an ECDSA signature in DER for ES"
    )


@pytest.mark.parametrize("curve", CURVES)
def test_openssl_verifies(curve: str, tmp_path: Path) -> None:
    made = sign(OF, certificate(curve), key(curve))
    from enclavekit.codec.cose import raw_to_der

    algorithm = made.certificate.algorithm
    (tmp_path / "cert.pem").write_bytes(made.certificate.pem)
    (tmp_path / "signed").write_bytes(made.cose.to_be_signed())
    (tmp_path / "signature").write_bytes(raw_to_der(made.cose.signature, algorithm, "x"))
    public = subprocess.run(
        ["openssl", "x509", "-in", tmp_path / "cert.pem", "-pubkey", "-noout"], stdout=subprocess.PIPE, check=True
    ).stdout
    (tmp_path / "public.pem").write_bytes(public)
    command = ["openssl", "dgst", f"-{algorithm.hash}", "-verify", "public.pem", "-signature", "signature", "signed"]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"Verified OK\n"


def test_forms_that_others_write() -> None:
    made = sign(OF, certificate(), key())
    pem, cose = made.certificate.pem, bytes(made.cose)
    forms = {
        "byte strings": [{"signing_certificate": pem, "signature": cose}],
        "tag 18": [{"signing_certificate": list(pem), "signature": list(b"\xd2" + cose)}],
        "another order": [{"signature": list(cose), "signing_certificate": list(pem)}],
        "another key": [{"signing_certificate": list(pem), "signature": list(cose), "more": 1}],
        "a second one": [{"signing_certificate": list(pem), "signature": list(cose)}, {"anything": 0}],
    }
    for name, value in forms.items():
        read = Signature.parse(cbor2.dumps(value))
        read.verify(OF)
        assert not read.canonical, name
    payload = cbor2.dumps({"register_value": OF, "register_index": 0})
    unsigned_odd = Sign1(made.cose.protected, payload, b"")
    raw = signed(OF, certificate(), key().sign_digest(unsigned(OF, certificate()).digest("x")))
    assert raw.pcr0 == replace(made, cose=unsigned_odd).pcr0 == OF


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "signature section: expected an array with a map in it"),
        ([], "signature section: expected an array with a map in it"),
        ([5], "signature section: expected an array with a map in it"),
        ([{}], "signature section: signing_certificate: expected an array of integers from 0 to 255"),
        (
            [{"signing_certificate": [256], "signature": b""}],
            "signature section: signing_certificate: expected an array of integers from 0 to 255",
        ),
        (
            [{"signing_certificate": [True], "signature": b""}],
            "signature section: signing_certificate: expected an array of integers from 0 to 255",
        ),
        (
            [{"signing_certificate": b"", "signature": [-1]}],
            "signature section: signature: expected an array of integers from 0 to 255",
        ),
        ([{"signing_certificate": b"", "signature": b"\x80"}], "signature: an array of 0, expected an array of 4"),
        (
            [{"signing_certificate": b"", "signature": b"\x80\x00"}],
            "signature: 1 bytes after the CBOR item, expected none",
        ),
    ],
)
def test_sections_that_are_none(value: object, message: str) -> None:
    assert refusal(EifError, lambda: Signature.parse(cbor2.dumps(value))) == message


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (5, "signature payload: expected register_index and register_value, and nothing else"),
        ({"register_index": 0}, "signature payload: expected register_index and register_value, and nothing else"),
        (
            {"register_index": 0, "register_value": OF, "x": 1},
            "signature payload: expected register_index and register_value, and nothing else",
        ),
        ({"register_index": 8, "register_value": OF}, "signature payload: register_index 8, expected 0"),
        ({"register_index": False, "register_value": OF}, "signature payload: register_index False, expected 0"),
        ({"register_index": 0, "register_value": OF[1:]}, "signature payload: register_value of 47 bytes, expected 48"),
        (
            {"register_index": 0, "register_value": "x"},
            "signature payload: register_value: expected an array of integers from 0 to 255",
        ),
    ],
)
def test_payloads_that_are_none(payload: object, message: str) -> None:
    made = Signature(certificate(), Sign1(b"", cbor2.dumps(payload), b""))
    assert refusal(FormatError, lambda: made.pcr0) == message


def bad_certificate(pem: bytes) -> str:
    return refusal(CertificateError, lambda: SigningCertificate(pem).key)


def test_certificates_that_cannot_sign_images() -> None:
    assert bad_certificate(b"") == "certificate: no certificate in PEM"
    assert bad_certificate(b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n").startswith(
        "certificate: damaged: "
    )
    rsa_key = rsa.generate_private_key(65537, 2048)
    kind = "expected EC on P-256, P-384 or P-521"
    assert bad_certificate(certificate_pem(rsa_key)) == f"certificate: a key of kind RSA, {kind}"
    edwards = ed25519.Ed25519PrivateKey.generate()
    assert bad_certificate(certificate_pem(edwards)) == f"certificate: a key of kind Ed25519, {kind}"
    odd = SigningCertificate(certificate_pem(key("K-256")))
    message = refusal(SignatureError, lambda: odd.key)
    assert message == "certificate: a key on secp256k1, expected secp256r1, secp384r1 or secp521r1"


def test_the_first_certificate_counts() -> None:
    both = SigningCertificate(b"words\n" + certificate("P-256").pem + certificate("P-384").pem)
    assert both.pcr8 == certificate("P-256").pcr8
    assert both.algorithm.name == "ES256"


def test_times() -> None:
    found = SigningCertificate(certificate_pem(key(), first=NOW - timedelta(days=10), days=100))
    found.check_validity(NOW)
    assert found.warning(NOW) is None
    assert found.warning(NOW + timedelta(days=70)) == (
        "certificate: expires on 2026-08-30; after it the enclave will not start"
    )
    for moment in (NOW - timedelta(days=11), NOW + timedelta(days=91)):
        message = f"certificate: valid from 2026-05-22 to 2026-08-30, not on {moment:%Y-%m-%d}"
        assert refusal(CertificateError, lambda at=moment: found.check_validity(at)) == message  # type: ignore[misc]
        assert found.warning(moment) == f"{message}: the enclave will not start"


def test_a_year_before_unix() -> None:
    found = SigningCertificate(certificate_pem(key(), first=datetime(1950, 1, 2, tzinfo=UTC), days=100))
    assert refusal(CertificateError, lambda: found.check_validity(NOW)) == (
        "certificate: valid from 1950-01-02 to 1950-04-12, not on 2026-06-01"
    )


def test_a_signer_is_a_small_protocol() -> None:
    assert isinstance(key(), MemoryKey)
    assert sign(OF, certificate(), key()).pcr0 == OF
