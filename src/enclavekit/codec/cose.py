# SPDX-License-Identifier: Apache-2.0
"""COSE_Sign1 (RFC 9052 §4.2): a payload and one ECDSA signature (RFC 9053 §2.1), R and S of the curve's size.

COSE_Sign1    = [protected: bstr, unprotected: map, payload: bstr, signature: bstr]
Sig_structure = ["Signature1", protected: bstr, external_aad: bstr, payload: bstr]     what is hashed and signed
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from hashlib import new as new_hash
from typing import TYPE_CHECKING, Self

from enclavekit.codec import cbor
from enclavekit.errors import FormatError, SignatureError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

ALG = 1
"""The header parameter with the algorithm (RFC 9052 §3.1)."""

_TAGS = (b"\xd8\x12", b"\xd2")
"""18, in one byte more than it needs, and as it should be."""


class Algorithm(Enum):
    """ECDSA with the hash that goes with each curve: COSE number, curve, hash, bytes of R and of S."""

    ES256 = (-7, "secp256r1", "sha256", 32)
    ES384 = (-35, "secp384r1", "sha384", 48)
    ES512 = (-36, "secp521r1", "sha512", 66)

    @property
    def number(self) -> int:
        """As in the header."""
        return self.value[0]

    @property
    def curve(self) -> str:
        """As cryptography and OpenSSL name it (secp256r1 is prime256v1)."""
        return self.value[1]

    @property
    def hash(self) -> str:
        """As hashlib names it."""
        return self.value[2]

    @property
    def size(self) -> int:
        """Bytes of R, and of S."""
        return self.value[3]

    @classmethod
    def of_curve(cls, curve: str, where: str) -> Self:
        """For a key; SignatureError for one that COSE has no algorithm for."""
        for one in cls:
            if one.curve == curve:
                return one
        raise SignatureError(f"{where}: a key on {curve}, expected secp256r1, secp384r1 or secp521r1")


@dataclass(frozen=True, slots=True)
class Sign1:
    """The parts; ``protected`` are the exact signed bytes. The unprotected header is dropped: it proves nothing."""

    protected: bytes
    payload: bytes
    signature: bytes

    @classmethod
    def unsigned(cls, algorithm: Algorithm, payload: bytes) -> Self:
        """To be signed: ``signature`` is empty."""
        return cls(cbor.encode({ALG: algorithm.number}), payload, b"")

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """From CBOR, with tag 18 or without."""
        for tag in _TAGS:
            data = data.removeprefix(tag)
        value = cbor.decode(data, where)
        if not isinstance(value, list) or len(value) != 4:
            raise FormatError(f"{where}: {_kind(value)}, expected an array of 4")
        protected, unprotected, payload, signature = value
        if not isinstance(unprotected, dict):
            raise FormatError(f"{where}: unprotected header is {_kind(unprotected)}, expected a map")
        for name, part in (("protected header", protected), ("payload", payload), ("signature", signature)):
            if not isinstance(part, bytes):
                raise FormatError(f"{where}: {name} is {_kind(part)}, expected a byte string")
        return cls(protected, payload, signature)

    def __bytes__(self) -> bytes:
        """Without a tag, as AWS's tools write it."""
        return cbor.encode([self.protected, {}, self.payload, self.signature])

    def algorithm(self, where: str) -> Algorithm:
        """What the protected header says."""
        header = cbor.decode(self.protected, f"{where}: protected header")
        if not isinstance(header, dict) or ALG not in header:
            raise FormatError(f"{where}: no algorithm in the protected header")
        number = header[ALG]
        for one in Algorithm:
            if one.number == number and type(number) is int:
                return one
        raise FormatError(f"{where}: algorithm {str(number)[:32]}, expected -7, -35 or -36 (ES256, ES384, ES512)")

    def to_be_signed(self) -> bytes:
        """The Sig_structure."""
        return cbor.encode(["Signature1", self.protected, b"", self.payload])

    def digest(self, where: str) -> bytes:
        """Of the Sig_structure, with the algorithm's hash: what the key signs."""
        return new_hash(self.algorithm(where).hash, self.to_be_signed()).digest()

    def verify(self, key: EllipticCurvePublicKey, where: str) -> None:
        """SignatureError unless this key made the signature, with the algorithm that goes with its curve."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ec, utils
        from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512

        algorithm = self.algorithm(where)
        if key.curve.name != algorithm.curve:
            raise SignatureError(f"{where}: {algorithm.name} by a key on {key.curve.name}, expected {algorithm.curve}")
        hashes = {Algorithm.ES256: SHA256(), Algorithm.ES384: SHA384(), Algorithm.ES512: SHA512()}
        prehashed = utils.Prehashed(hashes[algorithm])
        try:
            key.verify(raw_to_der(self.signature, algorithm, where), self.digest(where), ec.ECDSA(prehashed))
        except InvalidSignature as error:
            raise SignatureError(f"{where}: the signature is not by this key, or not over these bytes") from error


def raw_to_der(raw: bytes, algorithm: Algorithm, where: str) -> bytes:
    """R ‖ S as the DER sequence that OpenSSL, KMS and cryptography speak."""
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    size = algorithm.size
    if len(raw) != 2 * size:
        raise SignatureError(f"{where}: signature of {len(raw)} bytes, expected {2 * size} for {algorithm.name}")
    return encode_dss_signature(int.from_bytes(raw[:size], "big"), int.from_bytes(raw[size:], "big"))


def der_to_raw(der: bytes, algorithm: Algorithm, where: str) -> bytes:
    """The inverse, each number padded from the left."""
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    try:
        numbers = decode_dss_signature(der)
        return b"".join(number.to_bytes(algorithm.size, "big") for number in numbers)
    except (ValueError, OverflowError) as error:
        raise SignatureError(f"{where}: not an ECDSA signature in DER for {algorithm.name}") from error


def _kind(value: object) -> str:
    names = {list: "an array", dict: "a map", bytes: "a byte string", str: "a text string", int: "an integer"}
    return f"an array of {len(value)}" if isinstance(value, list) else names.get(type(value), "a simple value")
