# SPDX-License-Identifier: Apache-2.0
"""The authority that signs for one user's local enclaves: a chain shaped as AWS's, under names that are not.

    root (30 years) → regional (20 days) → zonal (5 days) → instance (24 hours) → leaf (3 hours)

Root, regional and zonal keys live in the authority's directory, mode 0700, each file 0600 but for ``root.pem``, which a
verifier is given. Instance and leaf keys live in the memory of the enclave's own process. All keys are P-384. What is
about to expire is made anew. A lock on the directory sees to it that there is one root, whoever comes at once.

The names end in ``enclavekit``, which AWS's never do, and a verifier trusts this root only when it is told so.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from enclavekit.attest.maker import make_document
from enclavekit.errors import CertificateError, FileError
from enclavekit.linux.atomic import replacing
from enclavekit.linux.locks import locked
from enclavekit.linux.private_directory import KEYS_HINT, private_directory

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate, Name

ROOT_FILE = "root.pem"
LOCK = "lock"
ORGANIZATION = "enclavekit, for development only"
DOMAIN = "development.enclavekit"
LEAF_DOMAIN = "local.enclavekit"

EARLY = timedelta(seconds=3)
"""How long before a certificate's making it is valid, as AWS's leaves are."""
RENEWAL = timedelta(minutes=40)
"""What is valid for less than this, or for less than what it signs for, is made anew."""


@dataclass(frozen=True, slots=True)
class _Level:
    """One kind of certificate: how long it is valid, how many may stand below it, what its key may do."""

    life: timedelta
    path_length: int | None
    usage: tuple[str, ...]


_CA_USAGE = ("digital_signature", "key_cert_sign", "crl_sign")
_ROOT = _Level(timedelta(days=30 * 365), None, _CA_USAGE)
_REGIONAL = _Level(timedelta(days=20, hours=1), 2, _CA_USAGE)
_ZONAL = _Level(timedelta(days=5), 1, _CA_USAGE)
_INSTANCE = _Level(timedelta(hours=24), 0, ("key_cert_sign",))
_LEAF = _Level(timedelta(hours=3) + EARLY, None, ("digital_signature", "content_commitment"))


@dataclass(frozen=True, slots=True)
class _Issuer:
    """A certificate and its key."""

    certificate: Certificate
    key: EllipticCurvePrivateKey

    @property
    def end(self) -> datetime:
        return self.certificate.not_valid_after_utc

    @property
    def der(self) -> bytes:
        from cryptography.hazmat.primitives.serialization import Encoding

        return self.certificate.public_bytes(Encoding.DER)


class Authority:
    """The keys in ``directory``, made when they are first needed. Errors: ``FileError``, ``CertificateError``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def issuers(self, now: datetime) -> list[_Issuer]:
        """Root, regional and zonal, each valid for as long as what it signs."""
        private_directory(self._directory, hint=KEYS_HINT)
        try:
            with locked(self._directory / LOCK):
                root = self._root(now)
                name = f"{_number()}.local.{DOMAIN}"
                regional = self._below(root, "regional", now, name=name, level=_REGIONAL, signs_for=_ZONAL.life)
                name = f"{_number()}.zonal.local.{DOMAIN}"
                zonal = self._below(regional, "zonal", now, name=name, level=_ZONAL, signs_for=_INSTANCE.life)
        except OSError as error:
            raise FileError.of(error, self._directory, "use") from error
        return [root, regional, zonal]

    def _root(self, now: datetime) -> _Issuer:
        found = self._load("root")
        if found is None and (self._directory / ROOT_FILE).exists():
            raise CertificateError(
                f"{self._directory}: {ROOT_FILE} and root.key do not belong together",
                hint=f"remove {self._directory}: the next enclave makes a new root, which verifiers must be given",
            )
        if found is None or found.end < now + _REGIONAL.life:
            found = _issue(None, DOMAIN, _ROOT, now)
            self._store("root", found)
        return found

    def _below(
        self, issuer: _Issuer, file: str, now: datetime, *, name: str, level: _Level, signs_for: timedelta
    ) -> _Issuer:
        found = self._load(file)
        if found is None or found.end < now + signs_for + RENEWAL or not _is_issued_by(found, issuer):
            found = _issue(issuer, name, level, now)
            self._store(file, found)
        return found

    def _load(self, file: str) -> _Issuer | None:
        """None where there is none, or one of the two files is not the other's."""
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key((self._directory / f"{file}.key").read_bytes(), None)
            certificate = x509.load_pem_x509_certificate((self._directory / f"{file}.pem").read_bytes())
        except (FileNotFoundError, ValueError, TypeError):
            return None
        if not isinstance(key, EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
            return None
        return _Issuer(certificate, key)

    def _store(self, file: str, made: _Issuer) -> None:
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        key = made.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        certificate = made.certificate.public_bytes(Encoding.PEM)
        # The key first: a certificate without one is what a crash must not leave.
        for name, data, mode in ((f"{file}.key", key, 0o600), (f"{file}.pem", certificate, 0o644)):
            with replacing(self._directory / name, mode=mode) as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())


class DocumentSigner:
    """Makes the documents of one enclave (``virtio.nsm.Attest``). Its leaf is used again until it nears its end."""

    def __init__(self, authority: Authority, module_id: str) -> None:
        self._authority = authority
        self._module_id = module_id
        self._chain: list[_Issuer] = []

    def __call__(
        self,
        pcrs: Mapping[int, bytes],
        *,
        public_key: bytes | None,
        user_data: bytes | None,
        nonce: bytes | None,
    ) -> bytes:
        """A signed document with the time of now. Errors: those of ``Authority``."""
        now = datetime.now(UTC)
        if (
            not self._chain
            or self._chain[-1].end < now + RENEWAL
            or self._chain[-1].certificate.not_valid_before_utc > now
        ):
            self._chain = self._new_chain(now)
        *bundle, leaf = self._chain
        return make_document(
            module_id=self._module_id,
            timestamp_ms=int(now.timestamp() * 1000),
            pcrs=pcrs,
            certificate=leaf.der,
            cabundle=[one.der for one in bundle],
            public_key=public_key,
            user_data=user_data,
            nonce=nonce,
            key=leaf.key,
        )

    def _new_chain(self, now: datetime) -> list[_Issuer]:
        issuers = self._authority.issuers(now)
        instance_id = self._module_id.rpartition("-")[0]
        instance = _issue(issuers[-1], f"{instance_id}.local.{DOMAIN}", _INSTANCE, now)
        return [*issuers, instance, _issue(instance, f"{self._module_id}.{LEAF_DOMAIN}", _LEAF, now)]


def _number() -> str:
    return secrets.token_hex(8)


def _is_issued_by(found: _Issuer, issuer: _Issuer) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        found.certificate.verify_directly_issued_by(issuer.certificate)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _issue(issuer: _Issuer | None, name: str, level: _Level, now: datetime) -> _Issuer:
    """A new key and its certificate; without an issuer its own."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA384

    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(name)
    usages = {
        usage: usage in level.usage
        for usage in (
            "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
            "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
        )
    }  # fmt: skip
    is_ca = "key_cert_sign" in level.usage
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before((now - EARLY).replace(microsecond=0))
        .not_valid_after((now - EARLY + level.life).replace(microsecond=0))
        .add_extension(x509.BasicConstraints(is_ca, level.path_length), critical=True)
        .add_extension(x509.KeyUsage(**usages), critical=is_ca)
    )
    if is_ca:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    if is_ca and issuer:
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
        builder = builder.add_extension(authority, critical=False)
    return _Issuer(builder.sign(issuer.key if issuer else key, SHA384()), key)


def _name(common_name: str) -> Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
        ]
    )
