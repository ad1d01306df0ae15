# SPDX-License-Identifier: Apache-2.0
"""Keys in PKCS#11 tokens: SoftHSM's, which is a real token's library."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from enclavekit.eif import sign
from enclavekit.errors import Error, FileError, MissingError, SigningError
from enclavekit.signing.certificate import self_signed
from enclavekit.signing.pkcs11_uri import Pkcs11Uri
from enclavekit.signing.signer import KeyReference, open_signer

PIN = "1234"
PCR0 = bytes(range(48))
CURVES = {"P-256": "secp256r1", "P-384": "secp384r1", "P-521": "secp521r1"}
LIBRARIES = ("/usr/lib/softhsm", "/usr/lib/x86_64-linux-gnu/softhsm", "/usr/lib64/softhsm")


@dataclass(frozen=True)
class Token:
    """A token that has been initialized; it needs PIN."""

    module: str
    label: str

    def uri(self, path: str) -> str:
        return f"pkcs11:token={self.label};{path}?module-path={self.module}"

    def make(self, curve: str, label: str, identity: bytes = b"\1", *, store_public: bool = True) -> None:
        """A pair of keys."""
        import pkcs11
        from pkcs11.util.ec import encode_named_curve_parameters

        token = pkcs11.lib(self.module).get_token(token_label=self.label)
        with token.open(user_pin=PIN, rw=True) as session:
            parameters = session.create_domain_parameters(
                pkcs11.KeyType.EC,
                {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters(curve)},
                local=True,
            )
            public, _ = parameters.generate_keypair(store=True, label=label, id=identity)
            if not store_public:
                public.destroy()

    def refusal(self, uri: str, kind: type[Error] = SigningError, pin: str | None = PIN) -> str:
        with pytest.raises(kind) as caught, open_signer(KeyReference(uri, None, pin)):
            pass
        assert type(caught.value) is kind
        assert PIN not in caught.value.message
        return caught.value.message


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SoftHSM's, with its tokens in a directory of the tests'. One a process: the library reads its settings once."""
    found = next((f"{path}/libsofthsm2.so" for path in LIBRARIES if Path(path, "libsofthsm2.so").exists()), None)
    if found is None or shutil.which("softhsm2-util") is None:
        message = "SoftHSM is not installed (softhsm2)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    root = tmp_path_factory.mktemp("softhsm")
    (root / "tokens").mkdir()
    (root / "softhsm2.conf").write_text(f"directories.tokendir = {root}/tokens\nlog.level = ERROR\n")
    os.environ["SOFTHSM2_CONF"] = str(root / "softhsm2.conf")
    for label in ("signing", "spare"):
        subprocess.run(
            ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", "5678"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    yield found
    del os.environ["SOFTHSM2_CONF"]


@pytest.fixture(scope="session")
def token(library: str) -> Token:
    """With a key for each curve."""
    made = Token(library, "signing")
    for number, (name, curve) in enumerate(CURVES.items()):
        made.make(curve, name, bytes([number]))
    return made


@pytest.mark.parametrize("curve", CURVES)
def test_certified_and_signed(token: Token, curve: str) -> None:
    with open_signer(KeyReference(token.uri(f"object={curve}"), None, PIN)) as signer:
        certificate = self_signed(signer, common_name="x", first=datetime(2026, 1, 1, tzinfo=UTC), days=1)
        made = sign(PCR0, certificate, signer)
    made.verify(PCR0)
    assert made.certificate.algorithm.curve == CURVES[curve]


def test_where_the_pin_may_come_from(token: Token, tmp_path: Path) -> None:
    (tmp_path / "pin").write_text(PIN + "\n")
    path = "object=P-256;id=%00;type=private"
    for more in (f"&pin-value={PIN}", f"&pin-source=file:{tmp_path}/pin", f"&pin-source={tmp_path}/pin"):
        with open_signer(KeyReference(token.uri(path) + more)) as signer:
            assert signer.public_key.curve.name == "secp256r1"
    with open_signer(KeyReference(f"pkcs11:token=signing;{path}", token.module, PIN)) as signer:
        assert signer.public_key.curve.name == "secp256r1"


def test_refusals(token: Token) -> None:
    shown = "pkcs11:token=signing;object=P-256"
    uri = token.uri("object=P-256")
    assert token.refusal(uri, pin="4321") == f"{shown}: wrong PIN"
    assert token.refusal(uri.replace("signing", "none")).endswith("0 tokens are so, expected exactly 1")
    assert token.refusal(token.uri("object=none")) == (
        "pkcs11:token=signing;object=none: 0 objects of class private_key, expected exactly 1"
    )
    assert token.refusal("pkcs11:object=P-256?module-path=" + token.module) == (
        "pkcs11:object=P-256: 2 tokens are so, expected exactly 1"
    )
    missing = token.refusal(uri.replace(token.module, "/none.so"), MissingError)
    assert missing == "/none.so: not a PKCS#11 library that can be loaded"
    assert token.refusal("pkcs11:object=x") == "pkcs11:object=x: no module, the library that speaks to the token"


def test_without_a_pin(token: Token) -> None:
    """Private keys cannot be seen then."""
    assert token.refusal(token.uri("object=P-256"), pin=None) == (
        "pkcs11:token=signing;object=P-256: 0 objects of class private_key, expected exactly 1"
    )


def test_several_keys_of_one_name(token: Token) -> None:
    token.make("secp256r1", "twice", b"\x10")
    token.make("secp384r1", "twice", b"\x11")
    assert token.refusal(token.uri("object=twice")) == (
        "pkcs11:token=signing;object=twice: 2 objects of class private_key, expected exactly 1"
    )
    with open_signer(KeyReference(token.uri("object=twice;id=%11"), None, PIN)) as signer:
        assert signer.public_key.curve.name == "secp384r1"


def test_a_key_without_its_public_half(token: Token) -> None:
    token.make("secp256r1", "lonely", b"\x20", store_public=False)
    assert token.refusal(token.uri("object=lonely")) == (
        "pkcs11:token=signing;object=lonely: the token has no public key, and no certificate, for it"
    )


def test_keys_of_other_kinds(token: Token) -> None:
    import pkcs11

    found: Any = pkcs11.lib(token.module).get_token(token_label=token.label)
    with found.open(user_pin=PIN, rw=True) as session:
        session.generate_keypair(pkcs11.KeyType.RSA, 1024, store=True, label="rsa")
    assert token.refusal(token.uri("object=rsa")) == (
        "pkcs11:token=signing;object=rsa: a key of type RSA, expected EC on P-256, P-384 or P-521"
    )
    token.make("secp256k1", "koblitz", b"\x30")
    assert token.refusal(token.uri("object=koblitz")) == (
        "pkcs11:token=signing;object=koblitz: not a key on P-256, P-384 or P-521"
    )


def test_a_uri_in_parts() -> None:
    parsed = Pkcs11Uri.parse(
        "pkcs11:token=My%20token;serial=0a;manufacturer=M;model=X;slot-id=7;object=k%3b;id=%00%ff"
        "?module-path=/lib/p.so&pin-value=1%264"
    )
    assert parsed == Pkcs11Uri(
        shown="pkcs11:token=My%20token;serial=0a;manufacturer=M;model=X;slot-id=7;object=k%3b;id=%00%ff",
        token="My token",  # noqa: S106
        serial="0a",
        manufacturer="M",
        model="X",
        slot=7,
        label="k;",
        id=b"\0\xff",
        module="/lib/p.so",
        pin="1&4",
    )
    assert "1&4" not in repr(parsed)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("pkcs11:", "pkcs11:: names no key"),
        ("pkcs11:token=x", "pkcs11:token=x: names no key"),
        (
            "pkcs11:object=x;colour=red",
            "pkcs11:object=x;colour=red: attribute 'colour', expected one of"
            " token, manufacturer, serial, model, slot-id, object, id, type",
        ),
        ("pkcs11:object=x;object=y", "pkcs11:object=x;object=y: object is there twice"),
        (
            "pkcs11:object=x?pin=1",
            "pkcs11:object=x: attribute 'pin', expected one of module-path, pin-value, pin-source",
        ),
        ("pkcs11:object=%ff", "pkcs11:object=%ff: an attribute that is not UTF-8"),
        ("pkcs11:object=x;slot-id=one", "pkcs11:object=x;slot-id=one: slot-id 'one', expected a number"),
        ("pkcs11:object=x;type=data", "pkcs11:object=x;type=data: type 'data', expected private"),
        (
            "pkcs11:object=x?pin-value=1&pin-source=y",
            "pkcs11:object=x: pin-value and pin-source, expected one of them",
        ),
        ("pkcs11:object=" + "x" * 5000, "pkcs11 URI: 5014 characters, expected at most 4096"),
    ],
)
def test_uris_that_are_none(uri: str, message: str) -> None:
    with pytest.raises(SigningError) as caught:
        Pkcs11Uri.parse(uri)
    assert caught.value.message == message


def test_a_pin_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        Pkcs11Uri.parse(f"pkcs11:object=x?pin-source=file://{tmp_path}/none")
    assert caught.value.message == f"cannot read the PIN from {tmp_path}/none: no such file or directory"
    (tmp_path / "pin").write_bytes(b"\xff")
    with pytest.raises(SigningError) as odd:
        Pkcs11Uri.parse(f"pkcs11:object=x?pin-source=file:{tmp_path}/pin")
    assert odd.value.message == f"{tmp_path}/pin: the PIN is not UTF-8"
