# SPDX-License-Identifier: Apache-2.0
"""Documents of a public key infrastructure of our own, shaped as AWS's, every part of which a test can get wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import sha384
from typing import Any

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from enclavekit.attest import Root

MADE = datetime(2026, 6, 1, 12, tzinfo=UTC)
"""When the document was made, unless a test says otherwise."""
INSTANCE = "i-0123456789abcdef0"
MODULE = f"{INSTANCE}-enc0123456789abcdef"
PROTECTED = bytes.fromhex("a1013822")
PCRS = {index: bytes(48) for index in range(16)} | {
    0: sha384(b"image").digest(),
    1: sha384(b"boot").digest(),
    2: sha384(b"application").digest(),
    3: sha384(b"role").digest(),
    4: sha384(bytes(48) + INSTANCE.encode()).digest(),
}
DEBUG_PCRS = PCRS | {0: bytes(48), 1: bytes(48), 2: bytes(48)}
Key = ec.EllipticCurvePrivateKey


@cache
def key(number: int, curve: type[ec.EllipticCurve] = ec.SECP384R1) -> Key:
    """One of a few that are made once: making them takes longer than signing."""
    return ec.generate_private_key(curve())


@dataclass(frozen=True)
class Link:
    """How one certificate of the chain is made. ``usage`` None leaves the extension out, as does ``ca``."""

    name: str
    key: Key
    issuer: str | None = None
    signer: Key | None = None
    ca: bool | None = True
    path_length: int | None = None
    usage: Sequence[str] | None = ("key_cert_sign", "digital_signature")
    first: datetime = MADE - timedelta(hours=1)
    last: datetime = MADE + timedelta(hours=2)
    hash: SHA256 | SHA384 = field(default_factory=SHA384)
    extensions: Sequence[tuple[x509.ExtensionType, bool]] = ()

    def certificate(self, issuer: Link) -> bytes:
        """In DER, issued by the next above unless the link says by whom."""
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(self.name))
            .issuer_name(_name(self.issuer or issuer.name))
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.first)
            .not_valid_after(self.last)
        )
        if self.ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(self.ca, self.path_length), critical=True)
        if self.usage is not None:
            usages = dict.fromkeys(_USAGES, False) | dict.fromkeys(self.usage, True)
            builder = builder.add_extension(x509.KeyUsage(**usages), critical=True)
        for extension, critical in self.extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.signer or issuer.key, self.hash).public_bytes(Encoding.DER)


_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def links() -> list[Link]:
    """Root, regional, zonal, instance, leaf, with the limits that AWS's have."""
    return [
        Link("test.nitro-enclaves", key(0), last=MADE + timedelta(days=9999)),
        Link("0123.us-east-1.test.nitro-enclaves", key(1), path_length=2, last=MADE + timedelta(days=20)),
        Link("4567.zonal.us-east-1.test.nitro-enclaves", key(2), path_length=1, last=MADE + timedelta(days=5)),
        Link(f"{INSTANCE}.us-east-1.test.nitro-enclaves", key(3), path_length=0, usage=("key_cert_sign",)),
        Link(f"{MODULE}.us-east-1.test", key(4), ca=False, usage=("digital_signature", "content_commitment")),
    ]


@cache
def good_chain() -> tuple[bytes, ...]:
    """The certificates of ``links``, root first."""
    return certificates(links())


def certificates(chain: Sequence[Link]) -> tuple[bytes, ...]:
    """In DER, root first."""
    return tuple(link.certificate(issuer) for issuer, link in zip([chain[0], *chain], chain, strict=False))


def changed(index: int, **values: Any) -> list[Link]:
    """``links`` with one of them made otherwise."""
    chain = links()
    chain[index] = replace(chain[index], **values)
    return chain


def root_of(chain: Sequence[bytes] | None = None) -> Root:
    """Of a chain; of ``good_chain`` without."""
    der = (chain or good_chain())[0]
    return Root.from_pem(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM), "test")


def payload(chain: Sequence[bytes] | None = None, **fields: Any) -> dict[Any, Any]:
    """In the NSM's order; a field given as ``...`` is left out, one that is not known comes last."""
    der = chain or good_chain()
    values = {
        "module_id": MODULE,
        "digest": "SHA384",
        "timestamp": int(MADE.timestamp() * 1000),
        "pcrs": PCRS,
        "certificate": der[-1],
        "cabundle": list(der[:-1]),
        "public_key": None,
        "user_data": None,
        "nonce": None,
    } | fields
    return {name: value for name, value in values.items() if value is not ...}


def encode(value: dict[Any, Any], *, indefinite: bool = True, twice: str | None = None) -> bytes:
    """A payload's bytes; ``twice`` writes one entry again at the end."""
    entries = [*value.items(), *([(twice, value[twice])] if twice else [])]
    body = b"".join(cbor2.dumps(name) + cbor2.dumps(one) for name, one in entries)
    return b"\xbf" + body + b"\xff" if indefinite else bytes([0xA0 + len(entries)]) + body


def sign(data: bytes, signer: Key | None = None, protected: bytes = PROTECTED) -> bytes:
    """R ‖ S over a payload's bytes."""
    signed = cbor2.dumps(["Signature1", protected, b"", data])
    numbers = decode_dss_signature((signer or key(4)).sign(signed, ec.ECDSA(SHA384())))
    return b"".join(number.to_bytes(48, "big") for number in numbers)


def envelope(data: bytes, signature: bytes, *, protected: Any = PROTECTED, unprotected: Any = ...) -> bytes:
    """COSE_Sign1 without a tag."""
    parts = [protected, {} if unprotected is ... else unprotected, data, signature]
    return cbor2.dumps(parts)


def document(chain: Sequence[bytes] | None = None, signer: Key | None = None, **fields: Any) -> bytes:
    """A good one but for what is given."""
    data = encode(payload(chain, **fields))
    return envelope(data, sign(data, signer))


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "XX"),
        ]
    )
