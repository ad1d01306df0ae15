# SPDX-License-Identifier: Apache-2.0
"""A signing certificate as ``nitro-cli describe-eif`` shows it, in OpenSSL's words.

Source: aws-nitro-enclaves-image-format src/utils/eif_reader.rs (SignCertificateInfo); OpenSSL crypto/objects for names.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from enclavekit.eif.signature import SigningCertificate, reading

_ATTRIBUTES = {
    "2.5.4.3": "commonName",
    "2.5.4.4": "surname",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "countryName",
    "2.5.4.7": "localityName",
    "2.5.4.8": "stateOrProvinceName",
    "2.5.4.9": "streetAddress",
    "2.5.4.10": "organizationName",
    "2.5.4.11": "organizationalUnitName",
    "2.5.4.12": "title",
    "2.5.4.13": "description",
    "2.5.4.17": "postalCode",
    "2.5.4.41": "name",
    "2.5.4.42": "givenName",
    "2.5.4.43": "initials",
    "2.5.4.44": "generationQualifier",
    "2.5.4.46": "dnQualifier",
    "2.5.4.65": "pseudonym",
    "2.5.4.97": "organizationIdentifier",
    "0.9.2342.19200300.100.1.1": "userId",
    "0.9.2342.19200300.100.1.25": "domainComponent",
    "1.2.840.113549.1.9.1": "emailAddress",
}
_SIGNATURE_ALGORITHMS = {
    "1.2.840.10045.4.1": "ecdsa-with-SHA1",
    "1.2.840.10045.4.3.1": "ecdsa-with-SHA224",
    "1.2.840.10045.4.3.2": "ecdsa-with-SHA256",
    "1.2.840.10045.4.3.3": "ecdsa-with-SHA384",
    "1.2.840.10045.4.3.4": "ecdsa-with-SHA512",
    "1.2.840.113549.1.1.5": "sha1WithRSAEncryption",
    "1.2.840.113549.1.1.10": "rsassaPss",
    "1.2.840.113549.1.1.11": "sha256WithRSAEncryption",
    "1.2.840.113549.1.1.12": "sha384WithRSAEncryption",
    "1.2.840.113549.1.1.13": "sha512WithRSAEncryption",
    "1.3.101.112": "ED25519",
    "1.3.101.113": "ED448",
}
_UNKNOWN = "undefined"


def certificate_object(certificate: SigningCertificate) -> dict[str, Any]:
    """The object under ``SigningCertificate``; CertificateError when a field cannot be read."""
    x509 = certificate.x509
    first, last = certificate.validity
    with reading("issuer"):
        issuer = {
            _ATTRIBUTES.get(attribute.oid.dotted_string, _UNKNOWN): _text(attribute.value).replace('"', "")
            for attribute in x509.issuer
        }
    with reading("signature"):
        algorithm, signature = x509.signature_algorithm_oid.dotted_string, x509.signature
    return {
        "IssuerName": dict(sorted(issuer.items())),
        "Algorithm": _SIGNATURE_ALGORITHMS.get(algorithm, _UNKNOWN),
        "NotBefore": _openssl_time(first),
        "NotAfter": _openssl_time(last),
        "Signature": signature.hex(":").upper(),
    }


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


def _openssl_time(moment: datetime) -> str:
    """As ASN1_TIME_print does, whatever the locale: ``Jan  1 00:00:00 2024 GMT``."""
    month = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")[moment.month - 1]
    return f"{month} {moment.day:2} {moment:%H:%M:%S} {moment.year} GMT"
