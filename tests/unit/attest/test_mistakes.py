# SPDX-License-Identifier: Apache-2.0
"""Mistakes that public verifiers of these documents have made: each of them has a test here, and its number."""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import suppress
from datetime import timedelta
from hashlib import sha256
from typing import Any

import cbor2
import pytest
from attestation_data import MADE as VECTORS
from attestation_data import needs_documents
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_documents import (
    DEBUG_PCRS,
    MADE,
    MODULE,
    PCRS,
    PROTECTED,
    Link,
    certificates,
    document,
    encode,
    envelope,
    good_chain,
    key,
    links,
    payload,
    root_of,
    sign,
)

from enclavekit.attest import AWS, AWS_US_GOV, Document, Policy, Verified, Verifier
from enclavekit.errors import AttestationError, NoReferenceValuesError, ZeroPcrError

IMAGE = Policy(accepted=[{0: PCRS[0]}])
ANY = Policy(any_measurement=True)
ATTACKER = key(9)


def judge(raw: bytes, policy: Policy = IMAGE, chain: tuple[bytes, ...] | None = None) -> Verified:
    return Verifier([root_of(chain)], clock=lambda: MADE).verify(raw, policy)


def code(raw: bytes, policy: Policy = IMAGE, chain: tuple[bytes, ...] | None = None) -> str:
    """Why it is refused."""
    with pytest.raises(AttestationError) as caught:
        judge(raw, policy, chain)
    return caught.value.code


def attackers_document(*, signer: ec.EllipticCurvePrivateKey = ATTACKER) -> tuple[bytes, ...]:
    """A chain of the attacker's own, which looks like ours."""
    return certificates([dataclasses.replace(link, key=signer) for link in links()])


def test_mistake_01_certificates_of_the_bundle_are_never_trust_anchors() -> None:
    """A pinned root, and behind it a root of the attacker's, which others put into the store of trusted ones."""
    same_names = attackers_document()
    assert code(document((good_chain()[0], *same_names), ATTACKER)) == "self-issued"
    assert code(document((good_chain()[0], *same_names[1:]), ATTACKER)) == "bad-cert-signature"
    other_name = certificates(
        [Link("attacker", ATTACKER), *(dataclasses.replace(link, key=ATTACKER) for link in links()[1:])]
    )
    assert code(document((good_chain()[0], *other_name), ATTACKER)) == "issuer-mismatch"


@needs_documents
def test_mistake_01_as_it_was_done() -> None:
    raw = (VECTORS / "bad_attacker_root_after_aws_root.bin").read_bytes()
    with pytest.raises(AttestationError) as caught:
        Verifier().verify_archived(raw, ANY)
    assert caught.value.code == "issuer-mismatch"


def test_mistake_02_the_root_is_neither_optional_nor_taken_from_the_bundle() -> None:
    forged = attackers_document()
    assert code(document(forged, ATTACKER)) == "untrusted-root"
    with pytest.raises(ValueError, match="trusts nothing"):
        Verifier([])
    with pytest.raises(AttestationError) as caught:
        Verifier(clock=lambda: MADE).verify(document(), IMAGE)
    assert caught.value.code == "untrusted-root"


@pytest.mark.parametrize("accepted", [[], [{}], [{0: PCRS[0]}, {}]])
def test_mistake_03_a_policy_without_pcrs_is_none(accepted: list[dict[int, bytes]]) -> None:
    with pytest.raises(NoReferenceValuesError):
        Policy(accepted=accepted)
    policy = inspect.signature(Verifier.verify).parameters["policy"]
    assert policy.default is inspect.Parameter.empty


def test_mistake_04_a_pcr_that_is_not_there_does_not_pass() -> None:
    sparse = {index: PCRS[index] for index in (0, 1, 2, 4)}
    assert code(document(pcrs=sparse), Policy(accepted=[{0: PCRS[0], 8: b"\1" * 48}])) == "pcr-mismatch"
    assert code(document(pcrs=sparse), Policy(accepted=[{0: PCRS[0], 3: PCRS[3]}])) == "pcr-mismatch"
    assert judge(document(pcrs=sparse), Policy(accepted=[{0: PCRS[0], 4: PCRS[4]}])).matched[4] == PCRS[4]


@pytest.mark.parametrize("zero", [(0, 1, 2), (0,), (1,), (2,)])
@pytest.mark.parametrize("absent", [False, True])
def test_mistake_05_debug_mode_is_seen_though_pcr3_and_pcr4_are_set(zero: tuple[int, ...], absent: bool) -> None:
    pcrs = {index: value for index, value in PCRS.items() if not (absent and index in zero)}
    pcrs |= {index: bytes(48) for index in zero if not absent}
    assert any(pcrs[4])
    assert code(document(pcrs=pcrs), ANY) == "debug-mode"
    assert judge(document(pcrs=pcrs), dataclasses.replace(ANY, allow_debug=True)).debug


@pytest.mark.parametrize("index", [0, 3, 8, 31])
def test_mistake_06_an_expected_pcr_of_zeros_is_refused_and_not_skipped(index: int) -> None:
    with pytest.raises(ZeroPcrError):
        Policy(accepted=[{0: PCRS[0], index: bytes(48)}])
    assert code(document(pcrs=DEBUG_PCRS), dataclasses.replace(IMAGE, allow_debug=True)) == "pcr-mismatch"


def test_mistake_07_an_enclaves_own_certificate_issues_none() -> None:
    """Whoever has a leaf's key, which is an enclave's hypervisor, could otherwise speak for every enclave."""
    leaf = links()[4]
    below = Link(f"{MODULE}.another.test", ATTACKER, ca=False, usage=("digital_signature",))
    assert code(document((*good_chain(), below.certificate(leaf)), ATTACKER)) == "path-length"
    unlimited = certificates([dataclasses.replace(link, path_length=None) for link in links()])
    forged = document((*unlimited, below.certificate(leaf)), ATTACKER)
    assert code(forged, chain=unlimited) == "ca-basic-constraints"
    deep = certificates([*links()[:4], Link("one more", ATTACKER), below])
    assert code(document(deep, ATTACKER), chain=deep) == "path-length"


@pytest.mark.parametrize("missing", [..., None, b""])
def test_mistake_08_without_a_certificate_nothing_is_verified(missing: object) -> None:
    assert code(document(certificate=missing)) in {"missing-field", "bad-type", "bad-length"}


def test_mistake_09_the_root_is_the_first_of_the_bundle() -> None:
    assert judge(document()).root == root_of()
    assert code(document(cabundle=list(reversed(good_chain()[:-1])))) == "untrusted-root"


def test_mistake_10_a_signature_in_der_is_refused() -> None:
    data = encode(payload())
    raw = sign(data)
    der = encode_dss_signature(int.from_bytes(raw[:48], "big"), int.from_bytes(raw[48:], "big"))
    assert code(envelope(data, der)) == "bad-signature-length"
    assert code(envelope(data, (der + bytes(96))[:96])) in {"bad-signature", "signature-out-of-range"}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({1: -7}, "bad-alg"),
        ({1: -36}, "bad-alg"),
        ({1: "ES384"}, "bad-alg"),
        ({1: None}, "bad-alg"),
        ({}, "bad-protected"),
        ({1: -35, 4: b"kid"}, "bad-protected"),
        ({2: -35}, "bad-protected"),
        ([1, -35], "bad-protected"),
    ],
)
def test_mistake_11_another_algorithm_is_refused_though_signed(header: object, expected: str) -> None:
    protected, data = cbor2.dumps(header), encode(payload())
    assert code(envelope(data, sign(data, protected=protected), protected=protected)) == expected


def test_mistake_12_duplicate_keys_and_trailing_bytes_are_refused_everywhere() -> None:
    twice = encode(payload(), twice="pcrs")
    assert code(envelope(twice, sign(twice))) == "duplicate-key"
    body = b"".join(cbor2.dumps(index) + cbor2.dumps(value) for index, value in [*PCRS.items(), (0, b"\2" * 48)])
    data = encode(payload()).replace(cbor2.dumps(PCRS), bytes([0xB1]) + body)
    assert code(envelope(data, sign(data))) == "duplicate-key"
    longer = encode(payload()) + b"\0"
    assert code(envelope(longer, sign(longer))) == "trailing-bytes"
    assert code(document() + b"\0") == "trailing-bytes"
    header = PROTECTED + b"\0"
    assert code(envelope(encode(payload()), bytes(96), protected=header)) == "trailing-bytes"


@pytest.mark.parametrize("size", [0, 23, 24, 255, 256, 4351, 4352, 4607, 4608, 16384])
def test_mistake_13_what_was_signed_has_the_lengths_that_it_has(size: int) -> None:
    read = dataclasses.replace(Document.parse(document()), payload=bytes(size))
    assert read.to_be_signed() == cbor2.dumps(["Signature1", PROTECTED, b"", bytes(size)])


@pytest.mark.parametrize(
    "options", [{}, {"user_data": bytes(1000)}, dict.fromkeys(("user_data", "nonce"), bytes(1024))]
)
def test_mistake_13_documents_of_many_sizes_hold(options: dict[str, Any]) -> None:
    assert judge(document(**options)).user_data == options.get("user_data")


def test_mistake_14_leading_zeros_of_keys_and_signatures_are_kept() -> None:
    short = next(one for one in iter(lambda: ec.generate_private_key(ec.SECP384R1()), None) if _leads_with_zero(one))
    chain = certificates([*links()[:4], dataclasses.replace(links()[4], key=short)])
    assert judge(document(chain, short), chain=chain).module_id == MODULE
    data = encode(payload())
    signature = next(one for one in iter(lambda: sign(data), None) if not one[0] or not one[48])
    assert judge(envelope(data, signature)).module_id == MODULE


def _leads_with_zero(one: ec.EllipticCurvePrivateKey) -> bool:
    point = one.public_key().public_numbers()
    return not point.x >> 376 or not point.y >> 376


@pytest.mark.parametrize("indefinite", [False, True])
@pytest.mark.parametrize("option", [None, b"", b"\1" * 513, b"\1" * 1024, ...])
def test_mistake_15_what_genuine_documents_have_is_accepted(indefinite: bool, option: object) -> None:
    pcrs = PCRS | dict.fromkeys(range(16, 32), b"\x07" * 48)
    data = encode(payload(user_data=option, nonce=option, pcrs=pcrs), indefinite=indefinite)
    verified = judge(envelope(data, sign(data)))
    assert verified.nonce == (None if option is ... else option)
    assert verified.pcrs[31] == b"\7" * 48


def test_mistake_15_indefinite_lengths_inside_too() -> None:
    chain = good_chain()
    data = encode(payload()).replace(cbor2.dumps(PCRS), b"\xbf" + cbor2.dumps(PCRS)[1:] + b"\xff")
    data = data.replace(cbor2.dumps(list(chain[:-1])), b"\x9f" + cbor2.dumps(list(chain[:-1]))[1:] + b"\xff")
    raw = envelope(data, sign(data))
    assert judge(b"\x9f" + raw[1:] + b"\xff").pcrs == PCRS


def test_mistake_16_a_document_that_is_old_is_stale_while_its_certificates_are_valid() -> None:
    verifier = Verifier([root_of()], clock=lambda: MADE + timedelta(minutes=30))
    with pytest.raises(AttestationError) as caught:
        verifier.verify(document(nonce=b"n" * 32), dataclasses.replace(IMAGE, nonce=b"n" * 32))
    assert caught.value.code == "stale"
    assert verifier.verify(document(), dataclasses.replace(IMAGE, max_age_s=3600)).module_id == MODULE


def test_mistake_17_nothing_switches_dates_off() -> None:
    """At its own time a document is judged by its own dates: one made after its key had expired does not hold."""
    late = document(timestamp=int((MADE + timedelta(hours=3)).timestamp() * 1000))
    for moment in (MADE, MADE + timedelta(hours=3)):
        verifier = Verifier([root_of()], clock=lambda moment=moment: moment)  # type: ignore[misc]
        for verify in (verifier.verify, verifier.verify_archived):
            with pytest.raises(AttestationError) as caught:
                verify(late, IMAGE)
            assert caught.value.code in {"cert-not-valid-at", "timestamp-outside-leaf"}


def test_mistake_18_chains_are_walked_once_and_are_short() -> None:
    root, *_ = links()
    one, two = Link("one", key(5), issuer="two", signer=key(6)), Link("two", key(6), issuer="one", signer=key(5))
    circle = [one.certificate(two), two.certificate(one)]
    chain = (root.certificate(root), *(circle * 3), good_chain()[-1])
    assert code(document(chain), chain=chain) == "issuer-mismatch"
    assert code(document(cabundle=[good_chain()[0]] * 9)) == "bad-cabundle"


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=200)
@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 100))
def test_mistake_19_odd_input_raises_our_error_and_no_other(noise: bytes, at: int, gone: int) -> None:
    good = document()
    for raw in (noise, good[:at], good[:at] + noise + good[at + gone :], b"\x84" + noise):
        with suppress(AttestationError):
            assert judge(raw).document.payload == Document.parse(good).payload  # with a tag of 18, for example


def test_mistake_20_only_the_root_names_itself_as_its_issuer() -> None:
    doubled = links()[0]
    root = certificates([doubled])[0]
    again = dataclasses.replace(doubled, path_length=3, signer=doubled.key).certificate(doubled)
    chain = (root, again, *certificates(links())[1:])
    assert code(document(chain), chain=chain) == "self-issued"


def test_mistake_21_what_is_returned_is_what_was_verified() -> None:
    genuine = Document.parse(document(user_data=b"genuine"))
    other = Document.parse(document(user_data=b"forged", signer=ATTACKER))
    mixed = dataclasses.replace(genuine, unverified=other.unverified, payload=other.payload)
    verified = Verifier([root_of()], clock=lambda: MADE).verify(mixed, IMAGE)
    assert (verified.user_data, verified.document) == (b"genuine", genuine)
    assert not hasattr(genuine, "user_data")


def test_mistake_22_the_roots_are_those_that_aws_publishes() -> None:
    assert AWS.sha256.hex() == "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
    assert AWS_US_GOV.sha256.hex() == "20bcd30a3e168ea03789e1c45912bc123c4de3c977b8a6e1c125c7929d668b3b"
    wrong = bytearray(good_chain()[0])
    wrong[-1] ^= 1
    assert sha256(wrong).digest() != root_of().sha256
    assert code(document((bytes(wrong), *good_chain()[1:]))) == "untrusted-root"


def test_mistake_23_key_identifiers_are_not_demanded() -> None:
    """The NSM's leaf has neither them nor a name for a server; other certificates of the chain may have both."""
    assert not _extensions(good_chain()[-1]) & {"authorityKeyIdentifier", "subjectKeyIdentifier"}
    judge(document())
    chain = links()
    for index in range(1, 4):
        identifiers = [
            (x509.SubjectKeyIdentifier.from_public_key(chain[index].key.public_key()), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(chain[index - 1].key.public_key()), False),
        ]
        chain[index] = dataclasses.replace(chain[index], extensions=identifiers)
    made = certificates(chain)
    judge(document(made), chain=made)


def _extensions(der: bytes) -> set[str]:
    return {extension.oid._name for extension in x509.load_der_x509_certificate(der).extensions}


def test_every_mistake_has_its_test() -> None:
    names = [name for name in globals() if name.startswith("test_mistake_")]
    assert {int(name.split("_")[2]) for name in names} == set(range(1, 24))
