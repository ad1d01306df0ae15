# SPDX-License-Identifier: Apache-2.0
"""What both sides of the example agree on: how a TLS key is named in an attestation document, and how one is asked for.

The enclave makes its TLS key itself, and has the digest of it signed in ``user_data``. Whoever stands between can show
the document, for it is genuine; but not hold the key that it names.

    user_data = SHA-256("enclavekit example: TLS key, 1" ‖ 0x00 ‖ SubjectPublicKeyInfo in DER)

The words before the key give the digest its meaning: a document made for this is worth nothing where other words stand.
"""

from __future__ import annotations

from hashlib import sha256

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

PURPOSE = b"enclavekit example: TLS key, 1"
NONCE_SIZE = 32
LENGTH_SIZE = 2
"""Of the length before a document, big-endian."""


def user_data(certificate_der: bytes) -> bytes:
    """That names the certificate's key. Nothing else in the certificate counts."""
    key = x509.load_der_x509_certificate(certificate_der).public_key()
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return sha256(PURPOSE + b"\0" + spki).digest()
