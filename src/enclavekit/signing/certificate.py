# SPDX-License-Identifier: Apache-2.0
"""Self-signed certificates for signing keys, also for those that never leave a KMS or a token (RFC 5280 §4.1)."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NoReturn, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDH,
    ECDSA,
    EllipticCurve,
    EllipticCurvePrivateKey,
    EllipticCurvePrivateNumbers,
    EllipticCurvePublicKey,
    EllipticCurveSignatureAlgorithm,
)
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import Hash, HashAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    KeySerializationEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from enclavekit.eif import Signer, SigningCertificate
from enclavekit.errors import CertificateError, SigningError, UsageError
from enclavekit.signing.pem import HASHES

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_DAYS = 36500
MAX_NAME = 64
"""Characters of a common name (RFC 5280, ub-common-name)."""


def self_signed(signer: Signer, *, common_name: str, first: datetime, days: int) -> SigningCertificate:
    """A certificate of the signer's key, signed by it, valid for ``days`` from ``first`` on (with time zone).

    UsageError for a name or days that no certificate can have, SigningError when the key does not sign.
    """
    if not 1 <= days <= MAX_DAYS:
        raise UsageError(f"{days} days: expected 1 to {MAX_DAYS}")
    if not 1 <= len(common_name) <= MAX_NAME:
        raise UsageError(f"name of {len(common_name)} characters: expected 1 to {MAX_NAME}")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(signer.public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(first + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
    )
    key = _KeyElsewhere(signer)
    made = SigningCertificate(builder.sign(key, HASHES[key.curve.name]).public_bytes(Encoding.PEM))
    try:
        made.check_own_signature()
    except CertificateError as error:
        raise SigningError("the key gave a signature that does not hold") from error
    return made


class _KeyElsewhere(EllipticCurvePrivateKey):
    """A signer as the builder of certificates wants it: it asks for nothing but a signature."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer

    def sign(self, data: Buffer, signature_algorithm: EllipticCurveSignatureAlgorithm) -> bytes:
        """Over the digest, which is all that is sent to the key."""
        algorithm = signature_algorithm.algorithm
        if not isinstance(signature_algorithm, ECDSA) or isinstance(algorithm, Prehashed):
            raise TypeError("expected ECDSA over data")
        return self._signer.sign_digest(_digest(bytes(data), algorithm))

    def public_key(self) -> EllipticCurvePublicKey:
        return self._signer.public_key

    @property
    def curve(self) -> EllipticCurve:
        return self._signer.public_key.curve

    @property
    def key_size(self) -> int:
        return self.curve.key_size

    def exchange(self, algorithm: ECDH, peer_public_key: EllipticCurvePublicKey) -> bytes:
        del algorithm, peer_public_key
        self._refuse()

    def private_numbers(self) -> EllipticCurvePrivateNumbers:
        self._refuse()

    def private_bytes(
        self,
        encoding: Encoding,
        format: PrivateFormat,  # noqa: A002 - as the class above names it
        encryption_algorithm: KeySerializationEncryption,
    ) -> bytes:
        del encoding, format, encryption_algorithm
        self._refuse()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def _refuse(self) -> NoReturn:
        raise TypeError("this key can only sign")


def _digest(data: bytes, algorithm: HashAlgorithm) -> bytes:
    hasher = Hash(algorithm)
    hasher.update(data)
    return hasher.finalize()
