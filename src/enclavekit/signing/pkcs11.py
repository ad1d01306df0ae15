# SPDX-License-Identifier: Apache-2.0
"""A key in a PKCS#11 token, a hardware security module or SoftHSM: CKM_ECDSA over the digest.

Source: OASIS PKCS #11 v2.40, §2.3 for EC keys. The signature is checked where it is used (``eif.sign``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from enclavekit.codec.cose import Algorithm, raw_to_der
from enclavekit.errors import MissingError, SigningError
from enclavekit.signing.pkcs11_uri import Pkcs11Uri

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

MAX_KEYS = 64


@dataclass(frozen=True, slots=True)
class TokenSigner:
    """A private key in an open session."""

    shown: str
    key: Any
    public_key: EllipticCurvePublicKey

    def sign_digest(self, digest: bytes) -> bytes:
        """An ECDSA signature in DER."""
        import pkcs11

        algorithm = Algorithm.of_curve(self.public_key.curve.name, self.shown)
        with _asking(self.shown):
            raw = bytes(self.key.sign(digest, mechanism=pkcs11.Mechanism.ECDSA))
        return raw_to_der(raw, algorithm, self.shown)


@contextmanager
def open_token_key(words: str, *, module: str | None, pin: str | None) -> Iterator[TokenSigner]:
    """The key that the URI names, in a session that ends with the block.

    ``module`` and ``pin`` are for URIs without. SigningError when there is not exactly one such key, MissingError for a
    library that is lacking.
    """
    uri = Pkcs11Uri.parse(words)
    try:
        import pkcs11
    except ImportError as error:
        raise MissingError(
            "keys in PKCS#11 tokens need python-pkcs11", hint="pip install 'enclavekit[pkcs11]'"
        ) from error
    library = uri.module or module
    if not library:
        raise SigningError(
            f"{uri.shown}: no module, the library that speaks to the token",
            hint="add ?module-path=/usr/lib/softhsm/libsofthsm2.so, or --pkcs11-module",
        )
    with _asking(uri.shown):
        try:
            token = _token(pkcs11.lib(library), uri)
        except RuntimeError as error:  # what dlopen says
            raise MissingError(f"{library}: not a PKCS#11 library that can be loaded", hint=str(error)[:200]) from error
        session = token.open(user_pin=pin if uri.pin is None else uri.pin)
    try:
        with _asking(uri.shown):
            key = _only(session, uri, pkcs11.ObjectClass.PRIVATE_KEY)
            public = _public_key(session, uri, key)
        yield TokenSigner(uri.shown, key, public)
    finally:
        session.close()


def _token(library: Any, uri: Pkcs11Uri) -> Any:  # noqa: ANN401 - python-pkcs11 has no types
    found = []
    for slot in library.get_slots(token_present=True):
        token = slot.get_token()
        wanted = (
            (uri.slot, slot.slot_id),
            (uri.token, token.label),
            (uri.manufacturer, token.manufacturer_id),
            (uri.model, token.model),
            (uri.serial, _serial(token.serial)),
        )
        if token.flags & _initialized() and all(want is None or want == has for want, has in wanted):
            found.append(token)
    if len(found) != 1:
        labels = ", ".join(repr(token.label) for token in found[:8])
        raise SigningError(
            f"{uri.shown}: {len(found)} tokens are so, expected exactly 1", hint=f"they are {labels}" if found else None
        )
    return found[0]


def _initialized() -> Any:  # noqa: ANN401
    import pkcs11

    return pkcs11.TokenFlag.TOKEN_INITIALIZED


def _serial(serial: bytes | str) -> str:
    text = serial.decode("ascii", "replace") if isinstance(serial, bytes) else serial
    return text.strip()


def _only(session: Any, uri: Pkcs11Uri, kind: Any, **more: Any) -> Any:  # noqa: ANN401
    """The one object of this kind; SigningError when there are none, or several."""
    import pkcs11

    template: dict[Any, Any] = {pkcs11.Attribute.CLASS: kind}
    if uri.label is not None:
        template[pkcs11.Attribute.LABEL] = uri.label
    if uri.id is not None:
        template[pkcs11.Attribute.ID] = uri.id
    template |= more
    found = []
    for one in session.get_objects(template):
        found.append(one)
        if len(found) > MAX_KEYS:
            break
    if len(found) != 1:
        raise SigningError(
            f"{uri.shown}: {len(found)} objects of class {kind.name.lower()}, expected exactly 1",
            hint="name it by object=LABEL and id=%01%02" if found else "the PIN may be needed to see it",
        )
    return found[0]


def _public_key(session: Any, uri: Pkcs11Uri, key: Any) -> EllipticCurvePublicKey:  # noqa: ANN401
    """From the public key beside the private one, or a certificate there."""
    import pkcs11
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_der_public_key
    from pkcs11.util.ec import encode_ec_public_key

    from enclavekit.signing.pem import HASHES

    if key.key_type is not pkcs11.KeyType.EC:
        raise SigningError(f"{uri.shown}: a key of type {key.key_type.name}, expected EC on P-256, P-384 or P-521")
    try:
        try:
            der = encode_ec_public_key(_only(session, uri, pkcs11.ObjectClass.PUBLIC_KEY))
            public: object = load_der_public_key(der)
        except SigningError:
            certificate = _only(session, uri, pkcs11.ObjectClass.CERTIFICATE)
            public = x509.load_der_x509_certificate(certificate[pkcs11.Attribute.VALUE]).public_key()
    except SigningError as error:
        raise SigningError(f"{uri.shown}: the token has no public key, and no certificate, for it") from error
    except ValueError as error:
        raise SigningError(f"{uri.shown}: its public key cannot be read") from error
    if not isinstance(public, EllipticCurvePublicKey) or public.curve.name not in HASHES:
        raise SigningError(f"{uri.shown}: not a key on P-256, P-384 or P-521")
    return public


@contextmanager
def _asking(shown: str) -> Iterator[None]:
    """All that the token's library raises becomes a SigningError; it never has the PIN in it."""
    from pkcs11.exceptions import PinIncorrect, PinLocked, PKCS11Error, UserNotLoggedIn

    try:
        yield
    except PinIncorrect as error:
        raise SigningError(f"{shown}: wrong PIN", hint="after a few of them a token locks itself") from error
    except PinLocked as error:
        raise SigningError(f"{shown}: the token is locked, after too many wrong PINs") from error
    except UserNotLoggedIn as error:
        raise SigningError(f"{shown}: needs a PIN", hint="ENCLAVEKIT_PIN, or ?pin-source=file:PATH") from error
    except PKCS11Error as error:
        words = " ".join(str(error).split())[:160]
        raise SigningError(f"{shown}: {type(error).__name__}{f': {words}' if words else ''}") from error
