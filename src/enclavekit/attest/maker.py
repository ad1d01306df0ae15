# SPDX-License-Identifier: Apache-2.0
"""The making of attestation documents, byte for byte as the NSM writes them today.

COSE_Sign1 without a tag; the payload is a map of indefinite length, its nine keys in one order, what was not given is
null; maps and arrays inside are definite. Source: documents signed by AWS since 2025-07.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from enclavekit.codec import cbor
from enclavekit.codec.cose import Algorithm, Sign1, der_to_raw

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_INDEFINITE_MAP, _BREAK = b"\xbf", b"\xff"


def make_document(
    *,
    module_id: str,
    timestamp_ms: int,
    pcrs: Mapping[int, bytes],
    certificate: bytes,
    cabundle: Sequence[bytes],
    public_key: bytes | None,
    user_data: bytes | None,
    nonce: bytes | None,
    key: EllipticCurvePrivateKey,
) -> bytes:
    """Signed by ``key``, whose ``certificate`` (DER) is the leaf below ``cabundle``, root first."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA384

    fields = {
        "module_id": module_id,
        "digest": "SHA384",
        "timestamp": timestamp_ms,
        "pcrs": dict(sorted(pcrs.items())),
        "certificate": certificate,
        "cabundle": list(cabundle),
        "public_key": public_key,
        "user_data": user_data,
        "nonce": nonce,
    }
    entries = b"".join(cbor.encode(name) + cbor.encode(value) for name, value in fields.items())
    unsigned = Sign1.unsigned(Algorithm.ES384, _INDEFINITE_MAP + entries + _BREAK)
    signature = key.sign(unsigned.to_be_signed(), ec.ECDSA(SHA384()))
    return bytes(replace(unsigned, signature=der_to_raw(signature, Algorithm.ES384, "attestation document")))
