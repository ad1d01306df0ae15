# SPDX-License-Identifier: Apache-2.0
"""The authority of local enclaves: documents that hold by the strict verifier, keys that nobody else reads."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hashlib import sha384
from pathlib import Path

import pytest
from cryptography import x509

from enclavekit.attest import Document, Policy, Root, Verifier
from enclavekit.attest.authority import Authority, DocumentSigner
from enclavekit.enclave.security_module import DEFAULT_INSTANCE, check_instance_id, new_module_id
from enclavekit.errors import CertificateError, FileError, UntrustedRootError, UsageError

PCRS = {index: sha384(bytes([index])).digest() for index in range(16)}
NONCE = b"n" * 32
MODULE = new_module_id(DEFAULT_INSTANCE, "0a1b2c3d")


def document(directory: Path, nonce: bytes | None = NONCE) -> bytes:
    signer = DocumentSigner(Authority(directory), MODULE)
    return signer(PCRS, public_key=None, user_data=b"", nonce=nonce)


def dev_root(directory: Path) -> Root:
    return Root.development_from_pem((directory / "root.pem").read_bytes(), "development")


def test_its_documents_hold_and_only_when_its_root_is_given(tmp_path: Path) -> None:
    directory = tmp_path / "attestation"
    made = document(directory)
    policy = Policy(accepted=[PCRS], nonce=NONCE, user_data=b"")
    verified = Verifier([dev_root(directory)]).verify(made, policy)
    assert (verified.module_id, verified.public_key) == (MODULE, None)
    with pytest.raises(UntrustedRootError):
        Verifier().verify(made, policy)


def test_they_are_of_todays_form(tmp_path: Path) -> None:
    made = document(tmp_path / "a", nonce=None)
    assert made.startswith(bytes.fromhex("8444a1013822a0"))
    assert made[10:20] == b"\xbf\x69module_i"
    assert made[-99] == 0xFF  # the break, before a head of two bytes and the signature
    claims = Document.parse(made).unverified
    assert (claims.nonce, claims.user_data, claims.public_key) == (None, b"", None)


def test_names_are_none_of_awss(tmp_path: Path) -> None:
    claims = Document.parse(document(tmp_path / "a")).unverified
    names = [x509.load_der_x509_certificate(der).subject for der in (*claims.cabundle, claims.certificate)]
    assert all(name.rfc4514_string().partition(",")[0].endswith("enclavekit") for name in map(_reversed, names))
    assert not any("aws" in name.rfc4514_string().lower() for name in names)


def _reversed(name: x509.Name) -> x509.Name:
    return x509.Name(reversed(list(name)))


def test_the_leaf_lives_three_hours(tmp_path: Path) -> None:
    leaf = x509.load_der_x509_certificate(Document.parse(document(tmp_path / "a")).unverified.certificate)
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(hours=3, seconds=3)


def test_keys_are_the_users_alone(tmp_path: Path) -> None:
    directory = tmp_path / "a"
    document(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    keys = sorted(directory.glob("*.key"))
    assert [key.name for key in keys] == ["regional.key", "root.key", "zonal.key"]
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_a_directory_that_others_may_read_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(
        FileError, match=r": mode drwxr-xr-x, owner \d+, expected a directory of user \d+ with mode "
    ) as caught:
        Authority(tmp_path).issuers(datetime.now(UTC))
    assert caught.value.hint == "keys are in it: make it yours with mode 0700, and remove it if others could read them"


def test_many_at_once_make_one_root(tmp_path: Path) -> None:
    directory = tmp_path / "a"
    with ThreadPoolExecutor(8) as pool:
        roots = {
            Document.parse(made).unverified.cabundle[0] for made in pool.map(lambda _: document(directory), range(8))
        }
    assert len(roots) == 1


def test_what_nears_its_end_is_made_anew_and_the_root_stays(tmp_path: Path) -> None:
    authority, now = Authority(tmp_path / "a"), datetime.now(UTC)
    root, regional, zonal = authority.issuers(now)
    assert [one.der for one in authority.issuers(now + timedelta(days=3))] == [root.der, regional.der, zonal.der]
    later = authority.issuers(now + timedelta(days=4, hours=1))
    assert (later[0].der, later[1].der) == (root.der, regional.der)
    assert later[2].der != zonal.der
    much_later = authority.issuers(now + timedelta(days=30))
    assert much_later[0].der == root.der
    assert much_later[1].der != regional.der


def test_a_root_without_its_key_is_never_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "a"
    document(directory)
    (directory / "root.key").unlink()
    with pytest.raises(CertificateError, match=r"root\.pem and root\.key do not belong together"):
        document(directory)


@pytest.mark.parametrize("text", ["", "i-", "i-xyz", "i-0123456789abcdef01", "0123456789", "i-0123456789ABCDEF0"])
def test_what_is_no_instance_id(text: str) -> None:
    with pytest.raises(UsageError, match="expected i- and 8 to 17 hexadecimal digits"):
        check_instance_id(text)


def test_the_leaf_is_used_again(tmp_path: Path) -> None:
    signer = DocumentSigner(Authority(tmp_path / "a"), MODULE)
    made = [Document.parse(signer(PCRS, public_key=None, user_data=None, nonce=nonce)) for nonce in (b"1", b"2")]
    assert made[0].unverified.certificate == made[1].unverified.certificate
    assert made[0].signature != made[1].signature
