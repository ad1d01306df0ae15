# SPDX-License-Identifier: Apache-2.0
"""An attestation document: COSE_Sign1 (RFC 9052 §4.2) with ES384 over a CBOR map, as the NSM and the NitroTPM sign it.

    document  = [protected: bstr {1: -35}, unprotected: {}, payload: bstr, signature: bstr of 96]     tag 18 or none
    payload   = {module_id: text, digest: "SHA384", timestamp: uint in ms since 1970,
                 pcrs / nitrotpm_pcrs: {0..31: bstr of 48}, certificate: DER, cabundle: [DER, root first],
                 public_key, user_data, nonce: bstr of at most 1024, null or absent}

Source: aws-nitro-enclaves-nsm-api docs/attestation_process.md, and documents that AWS has signed. Where they differ
documents count: options of up to 1024 bytes, null for one not given, since July 2025 a map of indefinite length.

Nothing here is verified: ``Claims`` are what somebody says. ``enclavekit.attest.verifier`` tells whether it is true.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Self

from enclavekit.attest.cbor_reader import CborReader, Major
from enclavekit.errors import (
    AlgorithmError,
    AmbiguousKindError,
    CertificateBundleError,
    DigestError,
    DocumentError,
    DocumentTooLargeError,
    DuplicateKeyError,
    FieldLengthError,
    FieldTypeError,
    MissingFieldError,
    ModuleIdError,
    NotCoseSign1Error,
    PayloadError,
    PayloadNotMapError,
    PcrIndexError,
    PcrLengthError,
    PcrsError,
    ProtectedHeaderError,
    SignatureLengthError,
    TimestampError,
    UnknownFieldError,
    UnprotectedHeaderError,
    WrongTagError,
)

MAX_SIZE = 32 << 10
MAX_PAYLOAD = 16384
MAX_OPTION = 1024
MAX_CERTIFICATE = 1024
MAX_BUNDLE = 8
MAX_MODULE_ID = 128
PCR_COUNT = 32
PCR_SIZE = 48
SIGNATURE_SIZE = 96
COSE_SIGN1_TAG = 18
ES384 = -35
DIGEST = "SHA384"

_ALG = 1
_PCR_NAMES = tuple(f"PCR{index}" for index in range(PCR_COUNT))
_OUTER, _HEADER, _PAYLOAD = "document", "protected header", "payload"
_SIGNATURE1 = b"\x84\x6aSignature1"
_HEX = re.compile(rb"[0-9a-fA-F\s]+")
_MAX_TEXT = 3 * MAX_SIZE  # hexadecimal, with line ends


class Kind(Enum):
    """Who measured what. The value is the name of the field with the PCRs."""

    ENCLAVE = "pcrs"
    NITROTPM = "nitrotpm_pcrs"

    @property
    def label(self) -> str:
        """As ``enclave verify --kind`` has it."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Claims:
    """What the payload says. The three options are None when null or absent; an empty one is ``b""``."""

    kind: Kind
    module_id: str
    timestamp_ms: int
    pcrs: Mapping[int, bytes]
    certificate: bytes
    cabundle: tuple[bytes, ...]
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None

    @property
    def instance_id(self) -> str:
        """The part of ``module_id`` that names the EC2 instance."""
        return self.module_id.rpartition("-")[0]

    @property
    def debug(self) -> bool:
        """Of an enclave: PCR0, PCR1 or PCR2 is zero or not there, which is how debug mode shows. Other PCRs are set."""
        return self.kind is Kind.ENCLAVE and not all(any(self.pcrs.get(index, b"")) for index in (0, 1, 2))


@dataclass(frozen=True, slots=True)
class Document:
    """The exact bytes received, and the parts of them. ``unverified`` has to be written out to get at what it says."""

    raw: bytes
    protected: bytes
    payload: bytes
    signature: bytes
    unverified: Claims

    def __bytes__(self) -> bytes:
        return self.raw

    @classmethod
    def parse(cls, raw: bytes, *, ignore_unknown: bool = False) -> Self:
        """DocumentError, by the rule that is broken. ``ignore_unknown`` lets fields pass that are not known here."""
        if len(raw) > MAX_SIZE:
            raise DocumentTooLargeError(f"{_OUTER}: {len(raw)} bytes, expected at most {MAX_SIZE}")
        raw = bytes(raw)
        protected, payload, signature = _parse_envelope(raw)
        return cls(raw, protected, payload, signature, _parse_payload(payload, ignore_unknown))

    @classmethod
    def parse_text(cls, data: bytes) -> Self:
        """The same from a file: the bytes themselves, or base64 (either alphabet) or hexadecimal digits of them."""
        return cls.parse(_decode_text(data))

    def to_be_signed(self) -> bytes:
        """The Sig_structure (RFC 9052 §4.4), of the protected header and the payload as received."""
        parts = [_SIGNATURE1, _bstr_head(len(self.protected)), self.protected, b"\x40"]
        return b"".join([*parts, _bstr_head(len(self.payload)), self.payload])


def _decode_text(data: bytes) -> bytes:
    if len(data) > _MAX_TEXT:
        raise DocumentTooLargeError(f"{_OUTER}: more than {_MAX_TEXT} bytes")
    if not data.isascii():
        return data  # CBOR arrays and tags begin with bytes that no text has
    text = b"".join(data.split())
    try:
        if _HEX.fullmatch(text):
            return binascii.unhexlify(text)
        padded = text.rstrip(b"=")
        return b64decode(padded.translate(bytes.maketrans(b"-_", b"+/")) + b"=" * (-len(padded) % 4), validate=True)
    except binascii.Error as error:
        raise DocumentError(f"{_OUTER}: neither CBOR nor base64 nor hexadecimal") from error


def _bstr_head(size: int) -> bytes:
    """The shortest one (RFC 8949 §4.2.1)."""
    if size < 24:
        return bytes([0x40 + size])
    return b"\x58" + bytes([size]) if size < 0x100 else b"\x59" + size.to_bytes(2, "big")


def _parse_envelope(raw: bytes) -> tuple[bytes, bytes, bytes]:
    reader = CborReader(raw, _OUTER)
    reader.check_form()
    if reader.peek() is Major.TAG:
        number = reader.tag()
        if number != COSE_SIGN1_TAG:
            raise WrongTagError(f"{_OUTER}: tag {number}, expected {COSE_SIGN1_TAG} or none")
    if reader.peek() is not Major.ARRAY:
        raise NotCoseSign1Error(f"{_OUTER}: {reader.next_name()}, expected an array of 4")
    parts: list[bytes] = []
    for index in reader.array(_OUTER):
        if index >= 4:
            raise NotCoseSign1Error(f"{_OUTER}: an array of more than 4, expected 4")
        parts.append((_protected, _unprotected, _payload, _signature)[index](reader))
    if len(parts) != 4:
        raise NotCoseSign1Error(f"{_OUTER}: an array of {len(parts)}, expected 4")
    return parts[0], parts[2], parts[3]


def _protected(outer: CborReader) -> bytes:
    if outer.peek() is not Major.BYTES:
        raise ProtectedHeaderError(f"{_HEADER}: {outer.next_name()}, expected a byte string")
    protected = outer.byte_string(_HEADER)
    if not protected:
        raise ProtectedHeaderError(f"{_HEADER}: empty, expected the algorithm")
    reader = CborReader(protected, _HEADER)
    if reader.peek() is not Major.MAP:
        raise ProtectedHeaderError(f"{_HEADER}: {reader.next_name()} in it, expected a map")
    algorithm = None
    for index in reader.map(_HEADER):
        if index or reader.peek() is not Major.UNSIGNED or reader.unsigned(_HEADER) != _ALG:
            raise ProtectedHeaderError(f"{_HEADER}: more than the algorithm")
        if reader.peek() not in {Major.UNSIGNED, Major.NEGATIVE}:
            raise AlgorithmError(f"{_HEADER}: algorithm is {reader.next_name()}, expected {ES384} (ES384)")
        algorithm = reader.integer("algorithm")
    reader.end()
    if algorithm is None:
        raise ProtectedHeaderError(f"{_HEADER}: no algorithm")
    if algorithm != ES384:
        raise AlgorithmError(f"{_HEADER}: algorithm {algorithm}, expected {ES384} (ES384)")
    return protected


def _unprotected(reader: CborReader) -> bytes:
    if reader.peek() is not Major.MAP:
        raise UnprotectedHeaderError(f"unprotected header: {reader.next_name()}, expected an empty map")
    for _ in reader.map("unprotected header"):
        raise UnprotectedHeaderError("unprotected header: not empty")
    return b""


def _payload(reader: CborReader) -> bytes:
    if reader.peek() is not Major.BYTES:
        raise PayloadError(f"{_PAYLOAD}: {reader.next_name()}, expected a byte string")
    payload = reader.byte_string(_PAYLOAD)
    if not 1 <= len(payload) <= MAX_PAYLOAD:
        raise PayloadError(f"{_PAYLOAD}: {len(payload)} bytes, expected 1 to {MAX_PAYLOAD}")
    return payload


def _signature(reader: CborReader) -> bytes:
    if reader.peek() is not Major.BYTES:
        raise SignatureLengthError(f"signature: {reader.next_name()}, expected {SIGNATURE_SIZE} bytes")
    signature = reader.byte_string("signature")
    if len(signature) != SIGNATURE_SIZE:
        raise SignatureLengthError(f"signature: {len(signature)} bytes, expected {SIGNATURE_SIZE}")
    return signature


def _parse_payload(payload: bytes, ignore_unknown: bool) -> Claims:
    reader = CborReader(payload, _PAYLOAD)
    if reader.peek() is not Major.MAP:
        raise PayloadNotMapError(f"{_PAYLOAD}: {reader.next_name()}, expected a map")
    found: dict[str, Any] = {}
    for _ in reader.map(_PAYLOAD):
        name = reader.text_string("key")
        if name in found:
            raise DuplicateKeyError(f"{_PAYLOAD}: {_shown(name)} twice")
        if name in _FIELDS:
            found[name] = _FIELDS[name](reader, name)
        elif ignore_unknown:
            reader.skip(_shown(name))
            found[name] = None
        else:
            raise UnknownFieldError(f"{_PAYLOAD}: {_shown(name)}, expected only the fields that are known")
    reader.end()
    kinds = [kind for kind in Kind if kind.value in found]
    if len(kinds) > 1:
        raise AmbiguousKindError(f"{_PAYLOAD}: pcrs and nitrotpm_pcrs, expected one of them")
    for name in (*_REQUIRED, *([] if kinds else [Kind.ENCLAVE.value])):
        if name not in found:
            raise MissingFieldError(f"{_PAYLOAD}: no {name}")
    return Claims(
        kind=kinds[0],
        module_id=found["module_id"],
        timestamp_ms=found["timestamp"],
        pcrs=found[kinds[0].value],
        certificate=found["certificate"],
        cabundle=found["cabundle"],
        public_key=found.get("public_key"),
        user_data=found.get("user_data"),
        nonce=found.get("nonce"),
    )


def _module_id(reader: CborReader, name: str) -> str:
    module_id = reader.text_string(name)
    if not 1 <= len(module_id) <= MAX_MODULE_ID or not module_id.isprintable():
        raise ModuleIdError(f"{name}: expected one line of 1 to {MAX_MODULE_ID} characters")
    return module_id


def _digest(reader: CborReader, name: str) -> str:
    digest = reader.text_string(name)
    if digest != DIGEST:
        raise DigestError(f"{name}: {_shown(digest)}, expected {DIGEST}")
    return digest


def _timestamp(reader: CborReader, name: str) -> int:
    timestamp = reader.unsigned(name)
    if not timestamp:
        raise TimestampError(f"{name}: 0, expected milliseconds since 1970")
    return timestamp


def _pcrs(reader: CborReader, name: str) -> Mapping[int, bytes]:
    pcrs: dict[int, bytes] = {}
    for entry in reader.map(name):
        if entry == PCR_COUNT:
            raise PcrsError(f"{name}: more than {PCR_COUNT}")
        try:
            index = reader.unsigned(name)
        except FieldTypeError as error:
            raise PcrIndexError(f"{name}: key is {reader.next_name()}, expected 0 to {PCR_COUNT - 1}") from error
        if index >= PCR_COUNT:
            raise PcrIndexError(f"{name}: key {index}, expected 0 to {PCR_COUNT - 1}")
        if index in pcrs:
            raise DuplicateKeyError(f"{name}: PCR{index} twice")
        value = reader.byte_string(_PCR_NAMES[index])
        if len(value) != PCR_SIZE:
            raise PcrLengthError(f"PCR{index}: {len(value)} bytes, expected {PCR_SIZE}")
        pcrs[index] = value
    if not pcrs:
        raise PcrsError(f"{name}: none, expected 1 to {PCR_COUNT}")
    return MappingProxyType(pcrs)


def _certificate(reader: CborReader, name: str) -> bytes:
    certificate = reader.byte_string(name)
    if not 1 <= len(certificate) <= MAX_CERTIFICATE:
        raise FieldLengthError(f"{name}: {len(certificate)} bytes, expected 1 to {MAX_CERTIFICATE}")
    return certificate


def _cabundle(reader: CborReader, name: str) -> tuple[bytes, ...]:
    bundle = []
    for index in reader.array(name):
        if index == MAX_BUNDLE:
            raise CertificateBundleError(f"{name}: more than {MAX_BUNDLE} certificates")
        bundle.append(_certificate(reader, f"{name}[{index}]"))
    if not bundle:
        raise CertificateBundleError(f"{name}: empty, expected 1 to {MAX_BUNDLE} certificates")
    return tuple(bundle)


def _option(reader: CborReader, name: str) -> bytes | None:
    if reader.null():
        return None
    value = reader.byte_string(name)
    if len(value) > MAX_OPTION:
        raise FieldLengthError(f"{name}: {len(value)} bytes, expected at most {MAX_OPTION}")
    return value


def _public_key(reader: CborReader, name: str) -> bytes | None:
    key = _option(reader, name)
    if key == b"":
        raise FieldLengthError(f"{name}: empty, expected 1 to {MAX_OPTION} bytes, or null")
    return key


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 32 else f"{text[:32]}...")


_FIELDS: dict[str, Callable[[CborReader, str], Any]] = {
    "module_id": _module_id,
    "digest": _digest,
    "timestamp": _timestamp,
    Kind.ENCLAVE.value: _pcrs,
    Kind.NITROTPM.value: _pcrs,
    "certificate": _certificate,
    "cabundle": _cabundle,
    "public_key": _public_key,
    "user_data": _option,
    "nonce": _option,
}
_REQUIRED = ("module_id", "digest", "timestamp", "certificate", "cabundle")
