# SPDX-License-Identifier: Apache-2.0
"""COSE_Sign1: parts, bytes, signatures."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.codec import cbor
from enclavekit.codec.cose import Algorithm, Sign1, der_to_raw, raw_to_der
from enclavekit.errors import FormatError, SignatureError

CASES: Sequence[tuple[Algorithm, ec.EllipticCurve, HashAlgorithm]] = (
    (Algorithm.ES256, ec.SECP256R1(), SHA256()),
    (Algorithm.ES384, ec.SECP384R1(), SHA384()),
    (Algorithm.ES512, ec.SECP521R1(), SHA512()),
)


def make(algorithm: Algorithm, key: ec.EllipticCurvePrivateKey, hashing: HashAlgorithm) -> Sign1:
    unsigned = Sign1.unsigned(algorithm, b"payload")
    der = key.sign(unsigned.digest("x"), ec.ECDSA(utils.Prehashed(hashing)))
    return Sign1(unsigned.protected, unsigned.payload, der_to_raw(der, algorithm, "x"))


@pytest.mark.parametrize(("algorithm", "curve", "hashing"), CASES)
def test_a_signature_holds_until_a_bit_changes(
    algorithm: Algorithm, curve: ec.EllipticCurve, hashing: HashAlgorithm
) -> None:
    key = ec.generate_private_key(curve)
    made = make(algorithm, key, hashing)
    made.verify(key.public_key(), "x")
    for field in ("payload", "signature"):
        parts = {"protected": made.protected, "payload": made.payload, "signature": made.signature}
        parts[field] = parts[field][:-1] + bytes([parts[field][-1] ^ 1])
        with pytest.raises(SignatureError) as caught:
            Sign1(**parts).verify(key.public_key(), "x")
        assert caught.value.message == "x: the signature is not by this key, or not over these bytes"


def test_the_bytes_that_are_signed() -> None:
    # RFC 9052 §4.4; the header of ES256 is the map {1: -7}.
    sign1 = Sign1.unsigned(Algorithm.ES256, b"hello")
    assert sign1.protected.hex() == "a10126"
    assert sign1.to_be_signed().hex() == "846a5369676e61747572653143a10126404568656c6c6f"
    assert Sign1.unsigned(Algorithm.ES384, b"").protected.hex() == "a1013822"
    assert Sign1.unsigned(Algorithm.ES512, b"").protected.hex() == "a1013823"


def test_with_and_without_a_tag() -> None:
    sign1 = Sign1(bytes.fromhex("a10126"), b"p", b"s")
    assert bytes(sign1).hex() == "8443a10126a041704173"
    assert Sign1.parse(bytes(sign1), "x") == sign1
    assert Sign1.parse(b"\xd2" + bytes(sign1), "x") == sign1
    assert Sign1.parse(b"\xd8\x12" + bytes(sign1), "x") == sign1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "x: an integer, expected an array of 4"),
        ([b"", {}, b""], "x: an array of 3, expected an array of 4"),
        ([b"", [], b"", b""], "x: unprotected header is an array of 0, expected a map"),
        (["", {}, b"", b""], "x: protected header is a text string, expected a byte string"),
        ([b"", {}, None, b""], "x: payload is a simple value, expected a byte string"),
        ([b"", {}, b"", {}], "x: signature is a map, expected a byte string"),
    ],
)
def test_parts_of_the_wrong_kind(value: object, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        Sign1.parse(cbor.encode(value), "x")
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("protected", "message"),
    [
        ("a0", "x: no algorithm in the protected header"),
        ("80", "x: no algorithm in the protected header"),
        ("a10127", "x: algorithm -8, expected -7, -35 or -36 (ES256, ES384, ES512)"),
        ("a101654553323536", "x: algorithm ES256, expected -7, -35 or -36 (ES256, ES384, ES512)"),
        ("a201260126", "x: protected header: not the CBOR expected: error decoding map: duplicate map key: 1"),
    ],
)
def test_algorithms_that_are_none(protected: str, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        Sign1(bytes.fromhex(protected), b"", b"").algorithm("x")
    assert caught.value.message == message


def test_the_algorithm_must_be_the_curves() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(SignatureError) as caught:
        Sign1.unsigned(Algorithm.ES256, b"").verify(key.public_key(), "x")
    assert caught.value.message == "x: ES256 by a key on secp384r1, expected secp256r1"
    with pytest.raises(SignatureError) as caught:
        Algorithm.of_curve("secp256k1", "x")
    assert caught.value.message == "x: a key on secp256k1, expected secp256r1, secp384r1 or secp521r1"


def test_signatures_of_the_wrong_length() -> None:
    with pytest.raises(SignatureError) as caught:
        raw_to_der(b"short", Algorithm.ES256, "x")
    assert caught.value.message == "x: signature of 5 bytes, expected 64 for ES256"
    too_large = utils.encode_dss_signature(1, 1 << 256)
    for der in (b"", b"\x30\x00", too_large):
        with pytest.raises(SignatureError) as caught:
            der_to_raw(der, Algorithm.ES256, "x")
        assert caught.value.message == "x: not an ECDSA signature in DER for ES256"


@given(st.sampled_from(list(Algorithm)), st.data())
def test_raw_and_der_are_inverses(algorithm: Algorithm, data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=2 * algorithm.size, max_size=2 * algorithm.size))
    assert der_to_raw(raw_to_der(raw, algorithm, "x"), algorithm, "x") == raw
