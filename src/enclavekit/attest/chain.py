# SPDX-License-Identifier: Apache-2.0
"""The certificate chain of a document: a walk from the pinned root down to the leaf (RFC 5280 §6).

The bundle has its order, root first, so there is one path and nothing is searched. Each step looks at names, algorithms
and the signature; what holds for a pair of certificates holds for ever, and is remembered. Dates, and what each may
issue where it stands, are looked at every time.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtensionOID, NameOID, SignatureAlgorithmOID

from enclavekit.attest.roots import Root
from enclavekit.errors import (
    CaBasicConstraintsError,
    CaKeyUsageError,
    CertificateAlgorithmError,
    CertificateSignatureError,
    CertificateTimeError,
    ChainCertificateError,
    CriticalExtensionError,
    IssuerMismatchError,
    KeyTypeError,
    LeafBasicConstraintsError,
    LeafKeyUsageError,
    PathLengthError,
    SelfIssuedError,
    UntrustedRootError,
)

if TYPE_CHECKING:
    from enclavekit.attest.document import Claims

CACHED_LINKS = 512
"""Pairs of certificates remembered, about 4 KiB each."""

# cryptography warns of serial numbers that it will refuse some day; here they are refused, without a word beside.
warnings.filterwarnings("ignore", category=CryptographyDeprecationWarning, module=re.escape(__name__))

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ALGORITHM = ECDSA(SHA384())
_ALGORITHM_DER = bytes.fromhex("300a06082a8648ce3d040303")
_UNDERSTOOD = {ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE}


@dataclass(frozen=True, slots=True)
class ChainCertificate:
    """A certificate, and what the rules ask about it. Two are equal when their bytes are, as are two names."""

    der: bytes
    where: str = field(compare=False)
    parsed: x509.Certificate = field(compare=False)
    signed: bytes = field(compare=False)
    issuer: bytes = field(compare=False)
    subject: bytes = field(compare=False)
    key: EllipticCurvePublicKey = field(compare=False)
    not_before_ms: int = field(compare=False)
    not_after_ms: int = field(compare=False)
    basic_constraints: x509.BasicConstraints | None = field(compare=False)
    key_usage: x509.KeyUsage | None = field(compare=False)

    @property
    def common_name(self) -> str:
        """The subject's; empty when it has none, or several."""
        try:
            names = self.parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        except ValueError as error:
            raise ChainCertificateError(f"{self.where}: a damaged name") from error
        return str(names[0].value) if len(names) == 1 else ""

    @classmethod
    def parse(cls, der: bytes, where: str) -> ChainCertificate:
        """Raise for one that is damaged, has another key or algorithm, or says what is not understood."""
        try:
            certificate = x509.load_der_x509_certificate(der)
            extensions = certificate.extensions
            key = certificate.public_key()
            algorithm = certificate.signature_algorithm_oid
            first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            version = certificate.version
            tbs = certificate.tbs_certificate_bytes
        except UnsupportedAlgorithm as error:
            raise KeyTypeError(f"{where}: an unknown kind of key, expected EC on P-384") from error
        except Exception as error:  # ValueError, TypeError, OverflowError, InvalidVersion, DuplicateExtension...
            raise ChainCertificateError(f"{where}: not an X.509 certificate: {_reason(error)}") from error
        if version is not x509.Version.v3:
            raise ChainCertificateError(f"{where}: X.509 version {version.value + 1}, expected 3")
        if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
            raise KeyTypeError(f"{where}: a key that is not EC on P-384")
        if algorithm != SignatureAlgorithmOID.ECDSA_WITH_SHA384:
            raise CertificateAlgorithmError(
                f"{where}: signed with {algorithm.dotted_string}, expected ecdsa-with-SHA384"
            )
        serial, inner, issuer, subject = _signed_parts(tbs)
        if int.from_bytes(serial[2:], "big", signed=True) <= 0:
            raise ChainCertificateError(f"{where}: a serial number that is not positive")
        if inner != _ALGORITHM_DER:
            raise CertificateAlgorithmError(f"{where}: names another algorithm inside than outside")
        constraints: x509.BasicConstraints | None = None
        usage: x509.KeyUsage | None = None
        for extension in extensions:
            if extension.critical and extension.oid not in _UNDERSTOOD:
                raise CriticalExtensionError(f"{where}: critical extension {extension.oid.dotted_string} is not known")
            if isinstance(extension.value, x509.BasicConstraints):
                constraints = extension.value
            elif isinstance(extension.value, x509.KeyUsage):
                usage = extension.value
        return cls(
            der,
            where,
            certificate,
            tbs,
            issuer,
            subject,
            key,
            _milliseconds(first),
            _milliseconds(last),
            constraints,
            usage,
        )


class ChainVerifier:
    """Walks chains that begin with one of ``roots``; remembers ``cached_links`` pairs. Threads may share one."""

    def __init__(self, roots: Iterable[Root], cached_links: int = CACHED_LINKS) -> None:
        self._roots = {root.sha256: root for root in roots}
        # Failures raise, and what raises is not remembered.
        self._anchor = lru_cache(maxsize=len(self._roots))(ChainCertificate.parse)
        self._issued = lru_cache(maxsize=cached_links)(_issued)

    def verify(self, claims: Claims, at_ms: int) -> tuple[Root, tuple[ChainCertificate, ...]]:
        """The root and the chain, root first and leaf last; TrustError unless all of it holds at that time."""
        anchor, *below = claims.cabundle
        root = self._roots.get(sha256(anchor).digest())
        if root is None:
            raise UntrustedRootError(
                f"cabundle[0]: the root with SHA-256 {sha256(anchor).hexdigest()[:16]}… is not trusted here",
                hint="a local enclave's document has its user's own root: --dev-root trusts it, --root any other",
            )
        chain = [self._anchor(anchor, "cabundle[0]")]
        for index, der in enumerate(below, 1):
            chain.append(self._issued(chain[-1], der, f"cabundle[{index}]"))
        chain.append(self._issued(chain[-1], claims.certificate, "leaf certificate"))
        for certificate in reversed(chain):
            _check_time(certificate, at_ms)
        for depth, issuer in enumerate(chain[:-1]):
            _check_issuer(issuer, cas_below=len(chain) - 2 - depth)
        _check_leaf(chain[-1])
        return root, tuple(chain)


def time_text(moment_ms: int) -> str:
    """``2026-01-03 12:00:00 UTC``, also for a number that no calendar has."""
    try:
        return f"{_EPOCH + timedelta(milliseconds=moment_ms):%Y-%m-%d %H:%M:%S} UTC"
    except OverflowError:
        return f"{moment_ms} ms after 1970"


def _issued(issuer: ChainCertificate, der: bytes, where: str) -> ChainCertificate:
    certificate = ChainCertificate.parse(der, where)
    if certificate.issuer != issuer.subject:
        raise IssuerMismatchError(f"{where}: not issued by {issuer.where}, by its name")
    if certificate.subject == certificate.issuer:
        raise SelfIssuedError(f"{where}: names itself as its issuer, which only the root may")
    try:
        issuer.key.verify(certificate.parsed.signature, certificate.signed, _ALGORITHM)
    except InvalidSignature as error:
        raise CertificateSignatureError(f"{where}: not signed by the key of {issuer.where}") from error
    return certificate


def _signed_parts(tbs: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Of a version 3 certificate: serial number, algorithm, issuer and subject, as they stand in what is signed.

    RFC 5280 §4.1: SEQUENCE {[0] version, serialNumber, signature, issuer, validity, subject, …}; the DER is good.
    """
    at = 2 + (tbs[1] & 0x7F if tbs[1] & 0x80 else 0)
    elements = []
    for _ in range(6):
        start, size = at, tbs[at + 1]
        at += 2
        if size & 0x80:  # the length takes so many bytes more
            width = size & 0x7F
            size = int.from_bytes(tbs[at : at + width], "big")
            at += width
        at += size
        elements.append(tbs[start:at])
    return elements[1], elements[2], elements[3], elements[5]


def _check_time(certificate: ChainCertificate, at_ms: int) -> None:
    if certificate.not_before_ms <= at_ms <= certificate.not_after_ms:
        return
    early = at_ms < certificate.not_before_ms
    limit = certificate.not_before_ms if early else certificate.not_after_ms
    raise CertificateTimeError(
        f"{certificate.where}: {'not valid before' if early else 'expired at'} {time_text(limit)}, "
        f"asked about {time_text(at_ms)}",
        hint="a certificate of an enclave lives three hours: ask for a new document, or judge this one at its own time",
    )


def _check_issuer(issuer: ChainCertificate, *, cas_below: int) -> None:
    constraints, usage = issuer.basic_constraints, issuer.key_usage
    if constraints is None or not constraints.ca:
        raise CaBasicConstraintsError(f"{issuer.where}: not a CA's certificate")
    if usage is None or not usage.key_cert_sign:
        raise CaKeyUsageError(f"{issuer.where}: its key may not sign certificates")
    if constraints.path_length is not None and constraints.path_length < cas_below:
        raise PathLengthError(f"{issuer.where}: {cas_below} CAs below it, it allows {constraints.path_length}")


def _check_leaf(leaf: ChainCertificate) -> None:
    constraints, usage = leaf.basic_constraints, leaf.key_usage
    if usage is None or not usage.digital_signature:
        raise LeafKeyUsageError(f"{leaf.where}: its key may not sign")
    if constraints is not None and (constraints.ca or constraints.path_length is not None):
        raise LeafBasicConstraintsError(f"{leaf.where}: a CA's certificate, expected an enclave's")


def _milliseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".").lower()[:120]
