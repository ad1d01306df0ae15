# SPDX-License-Identifier: Apache-2.0
"""What AWS KMS encrypts for an enclave: ``CiphertextForRecipient``, opened with a key that never left it.

The enclave makes an RSA key, has its public half put into an attestation document (``public_key``), and sends that
along with a request (Decrypt, GenerateDataKey, …) as ``Recipient``. KMS checks the document and its key policy, and
answers with a CMS EnvelopedData (RFC 5652 §6) for that key, in BER:

    ContentInfo             envelopedData, [0] EnvelopedData
    EnvelopedData           version, SET OF RecipientInfo (one), EncryptedContentInfo
    KeyTransRecipientInfo   version, [0] subjectKeyIdentifier, RSAES-OAEP (SHA-256, MGF1 with SHA-256), encrypted key
    EncryptedContentInfo    data, AES-256-CBC with IV, [0] the content: whole, or in octet strings to be joined

Nothing in it is authenticated, so why it does not open is never said: one error, whatever was wrong.

Source: AWS KMS API reference "RecipientInfo"; aws-nitro-enclaves-sdk-c source/cms.c.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from enclavekit.attest import ber
from enclavekit.errors import RecipientError

KEY_ENCRYPTION_ALGORITHM = "RSAES_OAEP_SHA_256"
KEY_SIZES = (2048, 3072, 4096)
MAX_SIZE = 6144
_ENVELOPED_DATA = bytes.fromhex("2a864886f70d010703")
_DATA = bytes.fromhex("2a864886f70d010701")
_RSAES_OAEP = bytes.fromhex("2a864886f70d010107")
_AES256_CBC = bytes.fromhex("60864801650304012a")
_IV_SIZE, _KEY_SIZE = 16, 32


@dataclass(frozen=True, slots=True)
class RecipientKey:
    """A key pair for one exchange with KMS. The private half is not for keeping: it dies with the object."""

    private: rsa.RSAPrivateKey

    @classmethod
    def generate(cls, bits: int = 2048) -> Self:
        """A new one, of 2048, 3072 or 4096 bits."""
        if bits not in KEY_SIZES:
            raise ValueError(f"an RSA key of {bits} bits, expected one of {KEY_SIZES}")
        return cls(rsa.generate_private_key(public_exponent=65537, key_size=bits))

    @property
    def public_key(self) -> bytes:
        """For the attestation request: SubjectPublicKeyInfo in DER, 294 bytes for 2048 bits."""
        return self.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def recipient(self, document: bytes) -> dict[str, Any]:
        """The parameter ``Recipient`` of a request, as boto3 takes it; the document must hold ``public_key``."""
        return {"AttestationDocument": document, "KeyEncryptionAlgorithm": KEY_ENCRYPTION_ALGORITHM}

    def open(self, ciphertext: bytes) -> bytes:
        """The plaintext of a ``CiphertextForRecipient`` (bytes, not base64); RecipientError for whatever is wrong."""
        try:
            encrypted_key, iv, content = _parse(ciphertext)
            key, holds = self._key(encrypted_key)
            decryptor = Cipher(AES256(key), CBC(iv)).decryptor()
            padded = decryptor.update(content) + decryptor.finalize()
            unpadder = PKCS7(128).unpadder()
            plaintext = unpadder.update(padded) + unpadder.finalize()
        except (ValueError, IndexError):
            holds, plaintext = False, b""
        if not holds:
            raise RecipientError("CiphertextForRecipient: does not open with this key")
        return plaintext

    def _key(self, encrypted: bytes) -> tuple[bytes, bool]:
        """The content's key; a random one, and False, for what cannot be decrypted, so that all goes on alike."""
        other = os.urandom(_KEY_SIZE)
        try:
            key = self.private.decrypt(encrypted, padding.OAEP(padding.MGF1(SHA256()), SHA256(), None))
        except ValueError:
            return other, False
        return (key, True) if len(key) == _KEY_SIZE else (other, False)


def _parse(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Encrypted key, IV and encrypted content; ValueError for another structure."""
    if len(data) > MAX_SIZE:
        raise ValueError("larger than KMS makes them")
    kind, wrapped = ber.parse(data).sequence(2)
    _demand(kind.octets(ber.OBJECT_IDENTIFIER) == _ENVELOPED_DATA)
    (enveloped,) = wrapped.constructed(ber.CONTEXT_0, 1)
    _version, recipients, content = enveloped.sequence(3)
    (recipient,) = recipients.constructed(ber.SET, 1)
    _version, _identifier, algorithm, key = recipient.sequence(4)
    _demand(algorithm.sequence()[0].octets(ber.OBJECT_IDENTIFIER) == _RSAES_OAEP)
    content_kind, content_algorithm, encrypted = content.sequence(3)
    _demand(content_kind.octets(ber.OBJECT_IDENTIFIER) == _DATA)
    cipher, iv = content_algorithm.sequence(2)
    _demand(cipher.octets(ber.OBJECT_IDENTIFIER) == _AES256_CBC)
    _demand(len(iv.octets(ber.OCTET_STRING)) == _IV_SIZE)
    return key.octets(ber.OCTET_STRING), iv.octets(ber.OCTET_STRING), encrypted.joined(ber.CONTEXT_0)


def _demand(so: bool) -> None:
    if not so:
        raise ValueError("another structure than that of KMS")
