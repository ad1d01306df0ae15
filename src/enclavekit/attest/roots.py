# SPDX-License-Identifier: Apache-2.0
"""Whom a verifier trusts: root certificates, by the SHA-256 of their DER.

The root stands in every document as the first certificate of its bundle. Its digest decides whether it is the one that
is trusted, so the key is always that of the pinned certificate, and nothing is fetched.

Source: AWS Nitro Enclaves user guide "Verifying the root of trust" (fingerprint of the commercial root).
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Self

from enclavekit.errors import CertificateError

_BEGIN = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Root:
    """A trusted root. ``development`` says that it vouches for nothing but documents made on a developer's machine."""

    name: str
    sha256: bytes
    development: bool = False

    def __post_init__(self) -> None:
        if len(self.sha256) != sha256().digest_size:
            raise ValueError(f"a root is pinned by a SHA-256 of 32 bytes, not {len(self.sha256)}")

    @classmethod
    def from_pem(cls, data: bytes, name: str) -> Self:
        """The one certificate in a PEM text; CertificateError when there is none, or more."""
        return cls(name, sha256(_der(data, name)).digest())

    @classmethod
    def development_from_pem(cls, data: bytes, name: str) -> Self:
        """The same, of the authority that signs for enclaves on a developer's machine."""
        return cls(name, sha256(_der(data, name)).digest(), development=True)


AWS = Root("AWS Nitro Enclaves", bytes.fromhex("641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"))
"""CN=aws.nitro-enclaves, valid from 2019-10-28 to 2049-10-28: the commercial regions."""

AWS_US_GOV = Root(
    "AWS Nitro Enclaves, GovCloud",
    bytes.fromhex("20bcd30a3e168ea03789e1c45912bc123c4de3c977b8a6e1c125c7929d668b3b"),
)
"""CN=aws-us-gov.nitro-enclaves, valid from 2020-09-10 to 2050-09-10."""

AWS_ROOTS = (AWS, AWS_US_GOV)
"""Trusted unless the caller says otherwise."""


def _der(data: bytes, name: str) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    count = data.count(_BEGIN)
    if count != 1:
        raise CertificateError(f"{name}: {count} certificates in PEM, expected one")
    try:
        return x509.load_pem_x509_certificate(data).public_bytes(Encoding.DER)
    except ValueError as error:
        raise CertificateError(f"{name}: a damaged certificate") from error
