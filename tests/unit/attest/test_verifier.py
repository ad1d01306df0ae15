# SPDX-License-Identifier: Apache-2.0
"""The verifier: every genuine document holds at its own time, and each rule refuses what breaks it, by its code."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import made_documents
import pytest
from attestation_data import MADE, REAL, damaged, made, needs_documents, real
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from made_documents import MODULE, PCRS, certificates, changed, document, links

from enclavekit.attest import AWS_ROOTS, Document, Kind, Moment, Policy, Root, Verified, Verifier
from enclavekit.attest.verifier import P384_ORDER
from enclavekit.errors import (
    AttestationError,
    BadSignatureError,
    CertificateTimeError,
    Error,
    KindMismatchError,
    StaleError,
    TimestampOutsideLeafError,
    TrustError,
    UntrustedRootError,
)

WHEN = made_documents.MADE
IMAGE = Policy(accepted=[{0: PCRS[0]}])
ANY = Policy(any_measurement=True)


def any_of(entry: dict[str, Any]) -> Policy:
    """That lets a known document pass whatever it measures."""
    return Policy(any_measurement=True, allow_debug=entry["debug_mode"], kind=Kind[entry["kind"].upper()])


def verifier(at: datetime = WHEN, roots: list[Root] | None = None) -> Verifier:
    """Of documents made here, at the time at which they are made."""
    return Verifier(roots or [made_documents.root_of()], clock=lambda: at)


@needs_documents
@pytest.mark.parametrize("entry", real())
def test_a_genuine_document_holds_at_its_own_time_and_not_now(entry: dict[str, Any]) -> None:
    raw, judge = (REAL / entry["file"]).read_bytes(), Verifier()
    verified = judge.verify_archived(raw, any_of(entry))
    assert (verified.module_id, verified.debug) == (entry["module_id"], entry["debug_mode"])
    assert (verified.root, verified.moment, verified.document.raw) == (AWS_ROOTS[0], Moment.DOCUMENT, raw)
    last = min(datetime.fromisoformat(one["not_after"]) for one in entry["chain"])
    assert (verified.made, verified.expires) == (datetime.fromisoformat(entry["timestamp"]), last)
    with pytest.raises(CertificateTimeError) as caught:
        judge.verify(raw, any_of(entry))
    leaf = datetime.fromisoformat(entry["chain"][0]["not_after"])
    assert str(caught.value).startswith(f"leaf certificate: expired at {leaf:%Y-%m-%d %H:%M:%S} UTC, asked about 20")


@needs_documents
@pytest.mark.parametrize("entry", real())
def test_a_genuine_document_holds_in_its_window_and_not_outside(entry: dict[str, Any]) -> None:
    raw, judge = (REAL / entry["file"]).read_bytes(), Verifier()
    policy = dataclasses.replace(any_of(entry), max_age_s=86400)
    first, last = map(datetime.fromisoformat, entry["verify_window"])
    made_at = datetime.fromisoformat(entry["timestamp"])
    assert judge.verify_at(raw, policy, max(first, made_at)).moment is Moment.GIVEN
    assert judge.verify_at(raw, policy, last).at == last
    for outside in (first - timedelta(seconds=1), last + timedelta(seconds=1)):
        with pytest.raises(CertificateTimeError):
            judge.verify_at(raw, policy, outside)


@needs_documents
@pytest.mark.parametrize("entry", damaged())
def test_a_damaged_document_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(AttestationError) as caught:
        Verifier().verify_archived((REAL / entry["file"]).read_bytes(), ANY)
    assert caught.value.code == entry["expected_failure"].partition(":")[0]


@needs_documents
@pytest.mark.parametrize("entry", made())
def test_a_made_document_has_its_expected_outcome(entry: dict[str, Any]) -> None:
    raw = (MADE / entry["file"]).read_bytes()
    test = Root.from_pem((MADE / "test_root.pem").read_bytes(), "test")
    judge = Verifier() if entry["root"] == "aws_nitro_root_g1" else Verifier([test])
    try:
        judge.verify_archived(raw, ANY)
        found = "ok"
    except Error as error:
        found = error.code
    assert found == entry["want"]
    with pytest.raises(AttestationError):
        Verifier().verify_archived(raw, ANY)


def test_a_good_document_holds() -> None:
    verified = verifier().verify(document(nonce=b"n" * 32, user_data=b""), IMAGE)
    assert (verified.module_id, verified.instance_id, verified.nonce) == (MODULE, made_documents.INSTANCE, b"n" * 32)
    assert (verified.public_key, verified.user_data) == (None, b"")
    assert verified.pcrs == PCRS
    assert verified.matched == {0: PCRS[0]}


def test_s_may_be_either_of_two() -> None:
    """Signatures are malleable, as ECDSA's are: no digest of a document tells whether it was seen before."""
    read = Document.parse(document())
    s = int.from_bytes(read.signature[48:], "big")
    other = read.signature[:48] + (P384_ORDER - s).to_bytes(48, "big")
    twin = made_documents.envelope(read.payload, other)
    assert twin != read.raw
    verifier().verify(twin, IMAGE)


def malformed_chain(index: int, **values: Any) -> bytes:
    return document(certificates(changed(index, **values)))


OTHER = made_documents.key(9)
CHAINS = {
    "untrusted-root": lambda: malformed_chain(0),
    "issuer-mismatch": lambda: malformed_chain(2, issuer="somebody else"),
    "self-issued": lambda: document(
        certificates([*links()[:2], dataclasses.replace(links()[1], path_length=1), *links()[3:]])
    ),
    "bad-cert-signature": lambda: malformed_chain(2, signer=OTHER),
    "bad-key-type": lambda: malformed_chain(3, key=made_documents.key(8, SECP256R1)),
    "bad-cert-sigalg": lambda: malformed_chain(4, hash=SHA256()),
    "unknown-critical-extension": lambda: malformed_chain(
        4, extensions=[(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0"), True)]
    ),
    "ca-basic-constraints": lambda: malformed_chain(3, ca=False, path_length=None),
    "ca-key-usage": lambda: malformed_chain(2, usage=("digital_signature",)),
    "path-length": lambda: malformed_chain(1, path_length=1),
    "leaf-key-usage": lambda: malformed_chain(4, usage=("key_agreement",)),
    "leaf-basic-constraints": lambda: malformed_chain(4, ca=True, path_length=0),
    "bad-certificate": lambda: document(certificate=b"\x30\x03\x02\x01\x01"),
    "cert-not-valid-at": lambda: malformed_chain(3, last=WHEN - timedelta(seconds=1)),
    "module-mismatch": lambda: document(module_id="i-0123456789abcdef0-enc0000000000000000"),
    "bad-signature": lambda: document(signer=OTHER),
}


@pytest.mark.parametrize("code", CHAINS)
def test_a_chain_that_breaks_a_rule(code: str) -> None:
    raw = CHAINS[code]()
    root = Document.parse(raw).unverified.cabundle
    roots = [made_documents.root_of(root)] if code != "untrusted-root" else None
    with pytest.raises(AttestationError) as caught:
        verifier(roots=roots).verify(raw, IMAGE)
    assert caught.value.code == code


@pytest.mark.parametrize("missing", [{"ca": None}, {"usage": None}])
def test_extensions_that_a_ca_must_have(missing: dict[str, None]) -> None:
    raw = malformed_chain(2, **missing)
    with pytest.raises(TrustError) as caught:
        verifier(roots=[made_documents.root_of(Document.parse(raw).unverified.cabundle)]).verify(raw, IMAGE)
    assert caught.value.code in {"ca-basic-constraints", "ca-key-usage"}


def test_a_leaf_without_usages_may_not_sign() -> None:
    raw = malformed_chain(4, usage=None)
    with pytest.raises(TrustError) as caught:
        verifier(roots=[made_documents.root_of(Document.parse(raw).unverified.cabundle)]).verify(raw, IMAGE)
    assert caught.value.code == "leaf-key-usage"


OUTSIDE = bytes.fromhex("300a06082a8648ce3d040303")


def leaf_tbs() -> bytes:
    return x509.load_der_x509_certificate(made_documents.good_chain()[-1]).tbs_certificate_bytes


def signed_again(tbs: bytes) -> bytes:
    """A leaf's certificate of something else to be signed."""
    signature = links()[3].key.sign(tbs, ECDSA(SHA384()))
    body = tbs + OUTSIDE + bytes([3, len(signature) + 1, 0]) + signature
    return b"\x30\x82" + len(body).to_bytes(2, "big") + body


def test_what_is_signed_again_holds() -> None:
    verifier().verify(document(certificate=signed_again(leaf_tbs())), IMAGE)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_a_serial_number_that_is_not_positive() -> None:
    tbs = bytearray(leaf_tbs())
    tbs[11] = 0x80  # behind the SEQUENCE's head, the version and the INTEGER's head; 0xFF might have been one too many
    with pytest.raises(TrustError) as caught:
        verifier().verify(document(certificate=signed_again(bytes(tbs))), IMAGE)
    assert str(caught.value) == "leaf certificate: a serial number that is not positive"


def test_a_certificate_with_two_algorithms() -> None:
    """Signed well, by its issuer; inside it says ECDSA with SHA-256, outside SHA-384."""
    inside = bytes.fromhex("300a06082a8648ce3d040302")
    der = signed_again(leaf_tbs().replace(OUTSIDE, inside))
    with pytest.raises(TrustError) as caught:
        verifier().verify(document(certificate=der), IMAGE)
    assert str(caught.value) == "leaf certificate: names another algorithm inside than outside"


def test_der_with_bytes_behind_it() -> None:
    with pytest.raises(TrustError) as caught:
        verifier().verify(document(certificate=made_documents.good_chain()[-1] + b"\0"), IMAGE)
    assert caught.value.code == "bad-certificate"


@pytest.mark.parametrize(
    ("offset_s", "code"),
    [(-61, "cert-not-valid-at"), (-30, None), (299, None), (301, "stale"), (7201, "cert-not-valid-at")],
)
def test_age(offset_s: int, code: str | None) -> None:
    leaf = changed(4, first=WHEN - timedelta(seconds=40))
    chain = certificates(leaf)
    judge = verifier(WHEN + timedelta(seconds=offset_s), [made_documents.root_of(chain)])
    if code is None:
        judge.verify(document(chain), IMAGE)
        return
    with pytest.raises(AttestationError) as caught:
        judge.verify(document(chain), IMAGE)
    assert caught.value.code == code


def test_a_document_of_the_future_is_stale_too() -> None:
    with pytest.raises(StaleError) as caught:
        verifier(WHEN - timedelta(seconds=61)).verify(document(), IMAGE)
    assert str(caught.value) == "policy: made 2026-06-01 12:00:00 UTC, 61 s in the future"


def test_its_own_time_says_nothing_of_age() -> None:
    judge = verifier(WHEN + timedelta(days=365))
    assert judge.verify_archived(document(), IMAGE).moment is Moment.DOCUMENT
    with pytest.raises(CertificateTimeError):
        judge.verify(document(), IMAGE)


def test_a_timestamp_in_seconds_is_refused() -> None:
    raw = document(timestamp=int(WHEN.timestamp()))
    with pytest.raises(TimestampOutsideLeafError):
        verifier().verify(raw, IMAGE)
    with pytest.raises(CertificateTimeError):
        verifier().verify_archived(raw, IMAGE)


def test_a_timestamp_of_no_calendar_is_refused() -> None:
    raw = document(timestamp=(1 << 64) - 1)
    for judge in (verifier().verify, verifier().verify_archived):
        with pytest.raises(TrustError):
            judge(raw, IMAGE)


def test_the_other_kind_is_refused() -> None:
    raw = document(pcrs=..., nitrotpm_pcrs=PCRS)
    with pytest.raises(KindMismatchError):
        verifier().verify(raw, IMAGE)
    verified = verifier().verify(raw, dataclasses.replace(IMAGE, kind=Kind.NITROTPM))
    assert verified.kind is Kind.NITROTPM
    assert not verified.debug
    with pytest.raises(KindMismatchError):
        verifier().verify(document(), dataclasses.replace(IMAGE, kind=Kind.NITROTPM))


def test_dates_of_remembered_links_are_looked_at() -> None:
    judge, raw = verifier(), document()
    judge.verify(raw, IMAGE)
    judge.verify(raw, IMAGE)
    with pytest.raises(CertificateTimeError):
        judge.verify_at(raw, IMAGE, WHEN + timedelta(hours=3))


def test_a_failure_is_not_remembered_as_a_success() -> None:
    chain = certificates(changed(2, signer=OTHER))
    judge = verifier(roots=[made_documents.root_of(chain)])
    for _ in range(3):
        with pytest.raises(TrustError):
            judge.verify(document(chain), IMAGE)


def test_a_link_is_remembered_for_its_issuer_only() -> None:
    """The same certificate below another one of the same name is looked at anew."""
    judge = verifier(roots=[made_documents.root_of()])
    judge.verify(document(), IMAGE)
    good = made_documents.good_chain()
    twin = links()[2]
    impostor = dataclasses.replace(twin, key=OTHER).certificate(links()[1])
    with pytest.raises(TrustError) as caught:
        judge.verify(document((*good[:2], impostor, *good[3:])), IMAGE)
    assert caught.value.code == "bad-cert-signature"


def test_what_is_remembered_is_bounded() -> None:
    judge = Verifier([made_documents.root_of()], clock=lambda: WHEN, cached_links=2)
    for _ in range(3):
        judge.verify(document(), IMAGE)


def test_only_a_verifier_makes_a_verified() -> None:
    verified = verifier().verify(document(), IMAGE)
    values = {one.name: getattr(verified, one.name) for one in dataclasses.fields(verified)}
    with pytest.raises(TypeError, match="only a Verifier"):
        Verified(**values, seal=object())
    with pytest.raises(ValueError, match="seal"):
        dataclasses.replace(verified, pcrs={})  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        verified.pcrs = {}  # type: ignore[misc]
    with pytest.raises(TypeError):
        verified.pcrs[0] = b""  # type: ignore[index]


def test_a_document_is_read_from_its_bytes_again() -> None:
    """Claims that somebody puts beside genuine bytes are not returned."""
    read = Document.parse(document())
    forged = dataclasses.replace(read, unverified=dataclasses.replace(read.unverified, user_data=b"forged"))
    assert verifier().verify(forged, IMAGE).user_data is None


def test_roots() -> None:
    root = made_documents.root_of()
    development = dataclasses.replace(root, development=True)
    with pytest.raises(ValueError, match="a verifier without roots trusts nothing"):
        Verifier([])
    with pytest.raises(ValueError, match="a verifier for development trusts no other root"):
        Verifier([*AWS_ROOTS, development])
    assert not any(one.development for one in AWS_ROOTS)
    with pytest.raises(UntrustedRootError):
        Verifier(clock=lambda: WHEN).verify(document(), IMAGE)
    assert verifier(roots=[development]).verify(document(), IMAGE).root.development


def test_the_verifier_needs_a_policy_and_a_time_with_its_zone() -> None:
    with pytest.raises(TypeError, match="a document is judged by a Policy"):
        verifier().verify(document(), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a time without its zone"):
        verifier().verify_at(document(), IMAGE, datetime(2026, 6, 1))  # noqa: DTZ001 - that is the mistake


@pytest.mark.parametrize("text", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_root_that_is_none(text: bytes) -> None:
    with pytest.raises(Error) as caught:
        Root.from_pem(text, "root.pem")
    assert caught.value.code == "certificate"


def test_the_time_is_the_clocks() -> None:
    judge = Verifier([made_documents.root_of()])
    before = datetime.now(UTC)
    now = certificates(
        [
            dataclasses.replace(link, first=before - timedelta(hours=1), last=before + timedelta(hours=1))
            for link in links()
        ]
    )
    judge = Verifier([made_documents.root_of(now)])
    verified = judge.verify(document(now, timestamp=int(before.timestamp() * 1000)), IMAGE)
    assert verified.moment is Moment.NOW
    assert before <= verified.at <= datetime.now(UTC)


def test_bad_signature_is_told_from_bad_trust() -> None:
    with pytest.raises(BadSignatureError) as caught:
        verifier().verify(document(signer=OTHER), IMAGE)
    assert not isinstance(caught.value, TrustError)
    assert str(caught.value) == "signature: not by the key of the certificate, or not over these bytes"
