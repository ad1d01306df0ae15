# SPDX-License-Identifier: Apache-2.0
"""Keys and certificates for the tests, made when they are first needed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from enclavekit.eif import SigningCertificate

NOW = datetime(2026, 6, 1, tzinfo=UTC)
CURVES: dict[str, ec.EllipticCurve] = {
    "P-256": ec.SECP256R1(),
    "P-384": ec.SECP384R1(),
    "P-521": ec.SECP521R1(),
    "K-256": ec.SECP256K1(),
}


@dataclass(frozen=True)
class MemoryKey:
    """A signer whose key is in memory."""

    private: ec.EllipticCurvePrivateKey

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self.private.public_key()

    def sign_digest(self, digest: bytes) -> bytes:
        hashes = {32: SHA256(), 48: SHA384(), 64: SHA512()}
        return self.private.sign(digest, ec.ECDSA(utils.Prehashed(hashes[len(digest)])))

    @property
    def pem(self) -> bytes:
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def key(curve: str = "P-384", number: int = 0) -> MemoryKey:
    """The same for the same arguments."""
    return _key(curve, number)


@cache
def _key(curve: str, number: int) -> MemoryKey:
    del number
    return MemoryKey(ec.generate_private_key(CURVES[curve]))


def certificate_pem(
    private: MemoryKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey,
    *,
    first: datetime = NOW - timedelta(days=100),
    days: int = 1000,
    name: str = "test",
) -> bytes:
    """Self-signed."""
    own = private.private if isinstance(private, MemoryKey) else private
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(own.public_key())
        .serial_number(1)
        .not_valid_before(first)
        .not_valid_after(first + timedelta(days=days))
        .sign(own, None if isinstance(own, ed25519.Ed25519PrivateKey) else SHA256())
    )
    return made.public_bytes(Encoding.PEM)


def certificate(curve: str = "P-384", number: int = 0) -> SigningCertificate:
    """Of that key, valid at NOW; always the same one."""
    return _certificate(curve, number)


@cache
def _certificate(curve: str, number: int) -> SigningCertificate:
    return SigningCertificate(certificate_pem(key(curve, number)))
