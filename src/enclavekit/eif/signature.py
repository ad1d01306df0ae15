# SPDX-License-Identifier: Apache-2.0
"""The signature section: PCR0, signed by a key whose certificate stands beside the signature.

Source: aws-nitro-enclaves-image-format src/defs/eif_hasher.rs, src/utils/eif_signer.rs, src/utils/cbor.rs.

    section = [{"signing_certificate": PEM text, "signature": COSE_Sign1}]      both as arrays of integers, a byte each
    payload = {"register_index": 0, "register_value": PCR0}                     the same
    PCR8    = extend(the certificate in DER)

Written as AWS's tools write it, byte for byte; read also with byte strings, with tag 18, with keys in any order. Of
several signatures, and of several certificates in the PEM text, only the first counts, for everyone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, Self

from enclavekit.codec import cbor
from enclavekit.codec.cose import Algorithm, Sign1, der_to_raw
from enclavekit.eif.measure import DIGEST_SIZE, extend
from enclavekit.errors import CertificateError, EifError, Error, FormatError, SignatureError, SigningError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.x509 import Certificate

SOON = timedelta(days=30)
"""An enclave does not start once its certificate has expired; this long before, people are told."""

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----\s[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
_MAX_DEPTH = 4


class Signer(Protocol):
    """A private key on P-256, P-384 or P-521, wherever it lies."""

    @property
    def public_key(self) -> EllipticCurvePublicKey:
        """The key's public half."""

    def sign_digest(self, digest: bytes) -> bytes:
        """An ECDSA signature in DER; the digest is SHA-256, SHA-384 or SHA-512, as goes with the curve."""


@dataclass(frozen=True)
class SigningCertificate:
    """A certificate in the PEM text that it came in. CertificateError when there is none, or none that can sign images.

    The certificate vouches for itself: whoever trusts the image trusts PCR8, which is its digest.
    """

    pem: bytes

    @cached_property
    def x509(self) -> Certificate:
        """The first one in the text."""
        from cryptography import x509

        block = _CERTIFICATE.search(self.pem)
        if block is None:
            raise CertificateError(
                "certificate: no certificate in PEM", hint="it starts with -----BEGIN CERTIFICATE-----"
            )
        with reading("damaged"):
            return x509.load_pem_x509_certificate(block[0])

    @cached_property
    def der(self) -> bytes:
        """What PCR8 is made of."""
        from cryptography.hazmat.primitives.serialization import Encoding

        return self.x509.public_bytes(Encoding.DER)

    @property
    def pcr8(self) -> bytes:
        """The PCR of all images signed with this certificate's key."""
        return extend(hashlib.sha384(self.der).digest())

    @cached_property
    def key(self) -> EllipticCurvePublicKey:
        """The public key."""
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

        with reading("unknown key"):
            key = self.x509.public_key()
        if not isinstance(key, EllipticCurvePublicKey):
            kind = type(key).__name__.lstrip("_").removesuffix("PublicKey")
            raise CertificateError(f"certificate: a key of kind {kind}, expected EC on P-256, P-384 or P-521")
        Algorithm.of_curve(key.curve.name, "certificate")
        return key

    @property
    def algorithm(self) -> Algorithm:
        """That its key signs with."""
        return Algorithm.of_curve(self.key.curve.name, "certificate")

    @property
    def validity(self) -> tuple[datetime, datetime]:
        """The first and the last moment."""
        with reading("validity"):
            return self.x509.not_valid_before_utc, self.x509.not_valid_after_utc

    def check_validity(self, at: datetime) -> None:
        """CertificateError unless the certificate is valid at that time (with time zone)."""
        first, last = self.validity
        if not first <= at <= last:
            raise CertificateError(
                f"certificate: valid from {first:%Y-%m-%d} to {last:%Y-%m-%d}, not on {at.astimezone(UTC):%Y-%m-%d}",
                hint="an enclave signed with it does not start at that time: sign anew with a valid certificate",
            )

    def warning(self, at: datetime) -> str | None:
        """A sentence when it is not valid, or not for long."""
        try:
            self.check_validity(at)
        except CertificateError as error:
            return f"{error.message}: the enclave will not start"
        last = self.validity[1]
        return (
            f"certificate: expires on {last:%Y-%m-%d}; after it the enclave will not start"
            if last - at < SOON
            else None
        )

    def check_own_signature(self) -> None:
        """CertificateError unless its own key signed it."""
        with reading("not signed by its own key"):
            self.x509.verify_directly_issued_by(self.x509)

    def check_key(self, key: EllipticCurvePublicKey) -> None:
        """SigningError unless this is its key."""
        if self.key.public_numbers() != key.public_numbers():
            raise SigningError(
                "the key does not belong to the certificate", hint="enclave keygen makes a pair that does"
            )


@dataclass(frozen=True)
class Signature:
    """The section's first element. ``canonical`` says whether the whole section is as AWS's tools write it."""

    certificate: SigningCertificate
    cose: Sign1
    canonical: bool = True

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """From the section's data, unverified."""
        try:
            value = cbor.decode(data, "signature section", max_depth=_MAX_DEPTH)
            if not isinstance(value, list) or not value or not isinstance(value[0], dict):
                raise EifError("signature section: expected an array with a map in it")
            pem = _octets(value[0].get("signing_certificate"), "signature section: signing_certificate")
            cose = _octets(value[0].get("signature"), "signature section: signature")
            made = cls(SigningCertificate(pem), Sign1.parse(cose, "signature"))
        except EifError:
            raise
        except FormatError as error:
            raise EifError(error.message) from error
        return replace(made, canonical=bytes(made) == data)

    def __bytes__(self) -> bytes:
        return cbor.encode(
            [{"signing_certificate": list(self.certificate.pem), "signature": list(bytes(self.cose))}],
        )

    @property
    def pcr0(self) -> bytes:
        """What was signed, unverified."""
        where = "signature payload"
        value = cbor.decode(self.cose.payload, where, max_depth=_MAX_DEPTH)
        if not isinstance(value, dict) or set(value) != {"register_index", "register_value"}:
            raise FormatError(f"{where}: expected register_index and register_value, and nothing else")
        index = value["register_index"]
        if index != 0 or type(index) is not int:
            raise FormatError(f"{where}: register_index {str(index)[:32]}, expected 0")
        pcr0 = _octets(value["register_value"], f"{where}: register_value")
        if len(pcr0) != DIGEST_SIZE:
            raise FormatError(f"{where}: register_value of {len(pcr0)} bytes, expected {DIGEST_SIZE}")
        return pcr0

    def check(self) -> None:
        """SignatureError unless the certificate's key made the signature, over whatever it signed."""
        self.cose.verify(self.certificate.key, "signature")

    def verify(self, pcr0: bytes, at: datetime | None = None) -> None:
        """Raise unless the signature is the key's, over this PCR0, and the certificate is valid at that time, if given.

        FormatError, SignatureError or CertificateError. That the certificate is the right one is not checked: compare
        PCR8.
        """
        self.check()
        if self.pcr0 != pcr0:
            raise SignatureError(
                f"signature: for an image with PCR0 {self.pcr0.hex()[:16]}..., this one's is {pcr0.hex()[:16]}...",
                hint="the image was changed after it was signed: enclave resign",
            )
        if at is not None:
            self.certificate.check_validity(at)


def unsigned(pcr0: bytes, certificate: SigningCertificate) -> Sign1:
    """What is to be signed: ``digest`` of it goes to the key."""
    payload = cbor.encode({"register_index": 0, "register_value": list(pcr0)})
    return Sign1.unsigned(certificate.algorithm, payload)


def signed(pcr0: bytes, certificate: SigningCertificate, signature: bytes) -> Signature:
    """Of a signature made elsewhere, in DER or as R ‖ S; SignatureError unless it is the key's, over this PCR0."""
    algorithm = certificate.algorithm
    raw = signature if len(signature) == 2 * algorithm.size else der_to_raw(signature, algorithm, "signature")
    made = Signature(certificate, replace(unsigned(pcr0, certificate), signature=raw))
    made.verify(pcr0)
    return made


def sign(pcr0: bytes, certificate: SigningCertificate, signer: Signer) -> Signature:
    """Sign with a key that is the certificate's; SigningError when it is another's."""
    certificate.check_key(signer.public_key)
    digest = unsigned(pcr0, certificate).digest("signature")
    try:
        return signed(pcr0, certificate, signer.sign_digest(digest))
    except SignatureError as error:
        raise SigningError(f"the key gave a signature that does not hold: {error.message}") from error


def _octets(value: object, where: str) -> bytes:
    """A byte string, or an array of a byte's integers."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, list) and all(type(one) is int and 0 <= one <= 255 for one in value):
        return bytes(value)
    raise FormatError(f"{where}: expected an array of integers from 0 to 255")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever cryptography raises for a field of a hostile certificate becomes a CertificateError."""
    try:
        yield
    except Error:
        raise
    except Exception as error:  # ValueError, TypeError, UnsupportedAlgorithm, InvalidVersion, InvalidSignature...
        reason = (str(error).splitlines() or [""])[0].rstrip(".").lower()[:120]
        raise CertificateError(f"certificate: {what}{f': {reason}' if reason else ''}") from error
