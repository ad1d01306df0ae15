# SPDX-License-Identifier: Apache-2.0
"""A private key in a PEM file: SEC1 or PKCS#8, plain or encrypted (RFC 5915, RFC 5958)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    SECP384R1,
    SECP521R1,
    EllipticCurve,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from enclavekit.errors import FileError, SigningError

MAX_SIZE = 1 << 16
CURVES: dict[str, EllipticCurve] = {"P-256": SECP256R1(), "P-384": SECP384R1(), "P-521": SECP521R1()}
HASHES: dict[str, SHA256 | SHA384 | SHA512] = {"secp256r1": SHA256(), "secp384r1": SHA384(), "secp521r1": SHA512()}
"""The hash that goes with each curve (RFC 9053 §2.1)."""


@dataclass(frozen=True, slots=True)
class PemSigner:
    """A key in memory."""

    private: EllipticCurvePrivateKey

    @property
    def public_key(self) -> EllipticCurvePublicKey:
        """The key's public half."""
        return self.private.public_key()

    def sign_digest(self, digest: bytes) -> bytes:
        """An ECDSA signature in DER."""
        return self.private.sign(digest, ECDSA(Prehashed(HASHES[self.private.curve.name])))

    def pem(self, password: str | None = None) -> bytes:
        """As a PKCS#8 file."""
        encryption: KeySerializationEncryption = NoEncryption()
        if password:
            encryption = BestAvailableEncryption(password.encode())
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)

    @classmethod
    def generate(cls, curve: str) -> Self:
        """A new key on P-256, P-384 or P-521."""
        return cls(generate_private_key(CURVES[curve]))

    @classmethod
    def open(cls, path: str, password: str | None = None) -> Self:
        """From a file; SigningError when there is no key in it that can sign images."""
        try:
            with Path(path).open("rb") as file:
                data = file.read(MAX_SIZE)
        except OSError as error:
            raise FileError.of(error, os.fspath(path), "read") from error
        try:
            key = load_pem_private_key(data, password.encode() if password else None)
        except TypeError as error:  # a password where none is needed, or none where one is
            state = "not encrypted, and a password was given" if password else "encrypted, and no password was given"
            raise SigningError(f"{path}: the key is {state}", hint="set ENCLAVEKIT_KEY_PASSWORD, or do not") from error
        except (ValueError, UnsupportedAlgorithm) as error:
            what = "no private key that this password opens" if password else "no private key in PEM"
            raise SigningError(f"{path}: {what}") from error
        if not isinstance(key, EllipticCurvePrivateKey):
            kind = type(key).__name__.lstrip("_").removesuffix("PrivateKey")
            raise SigningError(f"{path}: a key of kind {kind}, expected EC on P-256, P-384 or P-521")
        if key.curve.name not in HASHES:
            raise SigningError(f"{path}: a key on {key.curve.name}, expected P-256, P-384 or P-521")
        return cls(key)
