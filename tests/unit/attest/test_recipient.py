# SPDX-License-Identifier: Apache-2.0
"""CiphertextForRecipient, made by OpenSSL as KMS makes it, and damaged in every way."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_public_key
from hypothesis import given, settings
from hypothesis import strategies as st

from enclavekit.attest.recipient import RecipientKey
from enclavekit.errors import RecipientError

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
PLAINTEXT = b"a data key, or whatever KMS decrypted"
DATA = "06092a864886f70d010701"
ENVELOPED = "06092a864886f70d010703"
OAEP = "06092a864886f70d010107"
AES = "060960864801650304012a"


@cache
def recipient() -> RecipientKey:
    return RecipientKey.generate()


def tlv(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return bytes([tag]) + b"\x82" + len(content).to_bytes(2, "big") + content


def indefinite(tag: int, *parts: bytes) -> bytes:
    return bytes([tag]) + b"\x80" + b"".join(parts) + b"\0\0"


def enveloped(
    plaintext: bytes = PLAINTEXT,
    *,
    key: bytes | None = None,
    pad: bytes | None = None,
    mask: type[SHA1 | SHA256] = SHA256,
) -> bytes:
    """As the service writes it: indefinite lengths, the content in pieces, a subjectKeyIdentifier."""
    key, iv = key or os.urandom(32), os.urandom(16)
    fill = 16 - len(plaintext) % 16
    encryptor = Cipher(AES256(key.ljust(32)), CBC(iv)).encryptor()
    content = encryptor.update(plaintext + (bytes([fill]) * fill if pad is None else pad)) + encryptor.finalize()
    public = recipient().private.public_key()
    wrapped = public.encrypt(key, padding.OAEP(padding.MGF1(mask()), SHA256(), None))
    info = tlv(0x30, b"\2\1\2", tlv(0x80, b"k" * 20), tlv(0x30, bytes.fromhex(OAEP)), tlv(4, wrapped))
    pieces = [tlv(4, content[at : at + 16]) for at in range(0, len(content), 16)]
    encrypted = indefinite(
        0x30, bytes.fromhex(DATA), tlv(0x30, bytes.fromhex(AES), tlv(4, iv)), indefinite(0xA0, *pieces)
    )
    body = indefinite(0x30, b"\2\1\2", tlv(0x31, info), encrypted)
    return indefinite(0x30, bytes.fromhex(ENVELOPED), indefinite(0xA0, body))


def test_what_kms_sends_opens() -> None:
    assert recipient().open(enveloped()) == PLAINTEXT
    assert recipient().open(enveloped(b"")) == b""
    assert recipient().open(enveloped(b"x" * 4096)) == b"x" * 4096


@needs_openssl
@pytest.mark.parametrize("size", [0, 1, 16, 32, 4096])
@pytest.mark.parametrize("options", [[], ["-stream", "-indef"]])
def test_openssl_encrypts_and_we_open(size: int, options: list[str], tmp_path: Path) -> None:
    plain, certificate, key = tmp_path / "plain", tmp_path / "c.pem", tmp_path / "k.pem"
    plain.write_bytes(os.urandom(size))
    key.write_bytes(recipient().private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    run: list[str | Path] = [
        "openssl",
        "req",
        "-x509",
        "-new",
        "-key",
        key,
        "-subj",
        "/CN=enclave",
        "-days",
        "1",
        "-out",
        certificate,
    ]
    subprocess.run([*run, "-addext", "subjectKeyIdentifier=hash"], check=True, capture_output=True)
    words: list[str | Path] = [
        "-encrypt",
        "-binary",
        "-aes-256-cbc",
        "-keyid",
        "-outform",
        "DER",
        "-in",
        plain,
        *options,
    ]
    oaep: list[str | Path] = [
        "-recip",
        certificate,
        "-keyopt",
        "rsa_padding_mode:oaep",
        "-keyopt",
        "rsa_oaep_md:sha256",
    ]
    done = subprocess.run(["openssl", "cms", *words, *oaep], check=True, capture_output=True)
    assert recipient().open(done.stdout) == plain.read_bytes()


@needs_openssl
def test_openssl_opens_what_the_service_sends(tmp_path: Path) -> None:
    """So what these tests make is CMS."""
    key, sealed = tmp_path / "k.pem", tmp_path / "sealed"
    key.write_bytes(recipient().private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    sealed.write_bytes(enveloped_with_parameters())
    words: list[str | Path] = ["openssl", "cms", "-decrypt", "-inform", "DER", "-in", sealed, "-inkey", key]
    done = subprocess.run(words, check=True, capture_output=True)
    assert done.stdout == PLAINTEXT
    assert recipient().open(sealed.read_bytes()) == PLAINTEXT


def enveloped_with_parameters() -> bytes:
    """With RSAES-OAEP-params that say SHA-256 for both (RFC 4055 §4.1), which OpenSSL needs to be told."""
    sha256 = tlv(0x30, bytes.fromhex("0609608648016503040201"), b"\5\0")
    mgf1 = tlv(0x30, bytes.fromhex("06092a864886f70d010108"), sha256)
    parameters = tlv(0x30, tlv(0xA0, sha256), tlv(0xA1, mgf1))
    plain = enveloped()
    old = tlv(0x30, bytes.fromhex(OAEP))
    start = plain.index(tlv(0x31)[:1] + b"\x82")
    new = tlv(0x30, bytes.fromhex(OAEP), parameters)
    grown = plain.replace(old, new)
    extra = len(new) - len(old)
    for at in (start, start + 4):  # the SET, and the SEQUENCE in it
        size = int.from_bytes(plain[at + 2 : at + 4], "big") + extra
        grown = grown[: at + 2] + size.to_bytes(2, "big") + grown[at + 4 :]
    return grown


def refused(data: bytes, key: RecipientKey | None = None) -> None:
    with pytest.raises(RecipientError) as caught:
        (key or recipient()).open(data)
    assert (str(caught.value), caught.value.hint) == ("CiphertextForRecipient: does not open with this key", None)


def test_every_failure_is_the_same() -> None:
    good = enveloped()
    refused(good, RecipientKey(rsa.generate_private_key(public_exponent=65537, key_size=2048)))
    refused(enveloped(key=b"short"))
    refused(enveloped(mask=SHA1))
    refused(enveloped(pad=bytes(16 - len(PLAINTEXT) % 16)))
    refused(good + b"\0")
    refused(b"")
    refused(good * 12)
    refused(good.replace(bytes.fromhex(AES), bytes.fromhex("0609608648016503040102")))
    refused(good.replace(bytes.fromhex(DATA), bytes.fromhex(ENVELOPED), 1))
    for end in range(0, len(good), 7):
        refused(good[:end])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_anything_else_is_the_same_error(data: bytes) -> None:
    refused(data)
    refused(b"\x30\x80" * 40 + data)


def test_a_key_for_a_request() -> None:
    public = load_der_public_key(recipient().public_key)
    assert isinstance(public, rsa.RSAPublicKey)
    assert (public.key_size, len(recipient().public_key)) == (2048, 294)
    assert recipient().recipient(b"document") == {
        "AttestationDocument": b"document",
        "KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256",
    }
    with pytest.raises(ValueError, match="an RSA key of 1024 bits"):
        RecipientKey.generate(1024)
