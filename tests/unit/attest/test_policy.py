# SPDX-License-Identifier: Apache-2.0
"""Policies: how they are made, and what each demand refuses, with its words."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from hashlib import sha384
from pathlib import Path
from typing import Any

import made_documents
import pytest
from eif_images import KERNEL, PARTS, image
from made_documents import INSTANCE, MADE, MODULE, PCRS, document

from enclavekit import eif
from enclavekit.attest import Policy, Verified, Verifier, pcr_of_text
from enclavekit.eif import BytesContent, Section, SectionType
from enclavekit.errors import AttestationError, EifError, FileError, FormatError, NoReferenceValuesError, ZeroPcrError
from enclavekit.signing.certificate import self_signed
from enclavekit.signing.pem import PemSigner

ONE, OTHER = {0: PCRS[0]}, {0: b"\5" * 48}


def judge(policy: Policy, **fields: Any) -> Verified:
    return Verifier([made_documents.root_of()], clock=lambda: MADE).verify(document(**fields), policy)


def test_one_accepted_set_is_enough_and_is_named() -> None:
    assert judge(Policy(accepted=[OTHER, ONE])).matched == ONE
    assert judge(Policy(any_measurement=True)).matched == {}


def test_a_set_holds_whole_or_not_at_all() -> None:
    """Half of one set and half of another is neither."""
    with pytest.raises(AttestationError) as caught:
        judge(Policy(accepted=[{0: PCRS[0], 1: b"\5" * 48}, {0: b"\5" * 48, 1: PCRS[1]}]))
    assert str(caught.value) == (
        f"policy: PCR1 is {PCRS[1].hex()[:16]}…, expected {'05' * 8}…; nor does any other of the 2 accepted sets hold"
    )


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "pcr-mismatch": ({"accepted": [OTHER]}, {}, f"policy: PCR0 is {PCRS[0].hex()[:16]}…, expected {'05' * 8}…"),
    "nonce-mismatch": (
        {"accepted": [ONE], "nonce": b"n" * 16},
        {"nonce": b""},
        f"policy: nonce is 0 bytes, …, expected 16 bytes, {'6e' * 8}…",
    ),
    "user-data-mismatch": (
        {"accepted": [ONE], "user_data": b"u"},
        {},
        "policy: user_data is not in the document, expected 1 bytes, 75…",
    ),
    "public-key-mismatch": (
        {"accepted": [ONE], "public_key": b"k"},
        {"public_key": b"l"},
        "policy: public_key is 1 bytes, 6c…, expected 1 bytes, 6b…",
    ),
    "module-id-mismatch": ({"accepted": [ONE], "module_id": "other"}, {}, f"policy: module {MODULE}, expected other"),
    "instance-id-mismatch": (
        {"accepted": [ONE], "instance_id": "i-0"},
        {},
        f"policy: instance {INSTANCE}, expected i-0",
    ),
    "debug-mode": (
        {"any_measurement": True},
        {"pcrs": made_documents.DEBUG_PCRS},
        "policy: the enclave runs in debug mode: its parent reads its console and memory",
    ),
}


@pytest.mark.parametrize("code", REFUSED)
def test_a_demand_that_is_not_met(code: str) -> None:
    demands, fields, message = REFUSED[code]
    with pytest.raises(AttestationError) as caught:
        judge(Policy(**demands), **fields)
    assert (caught.value.code, str(caught.value)) == (code, message)


def test_an_absent_nonce_is_not_an_empty_one() -> None:
    with pytest.raises(AttestationError) as caught:
        judge(Policy(accepted=[ONE], nonce=b"n" * 16))
    assert str(caught.value).startswith("policy: nonce is not in the document, expected 16 bytes")
    assert judge(Policy(accepted=[ONE]), nonce=b"unasked").nonce == b"unasked"
    with pytest.raises(AttestationError):
        judge(Policy(accepted=[ONE], user_data=b""))
    assert judge(Policy(accepted=[ONE], user_data=b""), user_data=b"").user_data == b""


def test_demands_that_are_met() -> None:
    demands = {"nonce": b"n" * 16, "user_data": b"u", "public_key": b"k"}
    policy = Policy(accepted=[ONE], module_id=MODULE, instance_id=INSTANCE, **demands)  # type: ignore[arg-type]
    assert judge(policy, **demands).public_key == b"k"


@pytest.mark.parametrize("number", [0, 1, 2, 8])
def test_debug_mode_that_is_allowed_does_not_stand_for_pcrs(number: int) -> None:
    policy = Policy(accepted=[{number: b"\5" * 48}], allow_debug=True)
    with pytest.raises(AttestationError) as caught:
        judge(policy, pcrs=made_documents.DEBUG_PCRS)
    assert caught.value.hint == "in debug mode PCR0, PCR1, PCR2 and PCR8 are zeros, whatever image runs"
    assert judge(Policy(accepted=[{4: PCRS[4]}], allow_debug=True), pcrs=made_documents.DEBUG_PCRS).debug


@pytest.mark.parametrize(
    "values",
    [
        {"nonce": b""},
        {"nonce": bytes(1025)},
        {"max_age_s": 0},
        {"max_age_s": float("inf")},
        {"max_age_s": float("nan")},
        {"any_measurement": True},
        {"accepted": [{32: PCRS[0]}]},
        {"accepted": [{0: PCRS[0][:32]}]},
    ],
)
def test_a_policy_that_can_not_be_meant(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Policy(**{"accepted": [ONE]} | values)


def test_a_nonce_in_text_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="nonce is str, expected bytes"):
        Policy(accepted=[ONE], nonce="00112233")  # type: ignore[arg-type]


def test_unknown_fields_pass_when_told_and_only_then() -> None:
    with pytest.raises(AttestationError) as caught:
        judge(Policy(accepted=[ONE]), extra={"a": [1, None, {"b": b"c"}]})
    assert str(caught.value) == "payload: 'extra', expected only the fields that are known"
    assert judge(Policy(accepted=[ONE], ignore_unknown=True), extra={"a": [1, None, {"b": b"c"}]}).pcrs == PCRS


def test_unknown_fields_are_bounded_too() -> None:
    deep: Any = 0
    for _ in range(20):
        deep = [deep]
    with pytest.raises(AttestationError) as caught:
        judge(Policy(accepted=[ONE], ignore_unknown=True), extra=deep)
    assert str(caught.value) == "payload: 'extra': deeper than 16 arrays and maps"


def test_the_caller_cannot_change_a_policy_behind_its_back() -> None:
    values = dict(ONE)
    policy = Policy(accepted=[values])
    values[0] = bytes(48)
    assert policy.accepted[0] == ONE
    with pytest.raises(TypeError):
        policy.accepted[0][0] = b""  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.allow_debug = True  # type: ignore[misc]


def test_pcr_of_text() -> None:
    assert pcr_of_text(INSTANCE) == PCRS[4] == sha384(bytes(48) + INSTANCE.encode()).digest()


def test_from_images(tmp_path: Path) -> None:
    first, second = tmp_path / "a.eif", tmp_path / "b.eif"
    first.write_bytes(image())
    key = PemSigner.generate("P-384")
    certificate = self_signed(key, common_name="release", first=datetime.now(UTC), days=1)
    with first.open("rb") as file, second.open("wb") as out:
        found, measured = eif.measure_to_sign(file, "a.eif")
        signature = eif.sign(measured.measurements.pcr0, certificate, key)
        eif.write_signed(out, file, found, measured, lambda _: bytes(signature), name="a.eif")
    policy = Policy.from_eif(first, second, nonce=b"n" * 16)
    unsigned, signed = policy.accepted
    pcrs = measured.measurements
    assert unsigned == {0: pcrs.pcr0, 1: pcrs.pcr1, 2: pcrs.pcr2}
    assert signed == {**unsigned, 8: certificate.pcr8}
    assert policy.nonce == b"n" * 16
    booted = PCRS | dict(signed)
    assert judge(Policy.from_eif(second), pcrs=booted).matched == signed
    flipped = bytearray(first.read_bytes())
    flipped[570] ^= 1  # of the kernel
    (tmp_path / "c.eif").write_bytes(flipped)
    with pytest.raises(EifError, match="CRC"):
        Policy.from_eif(tmp_path / "c.eif")


def test_one_bit_of_an_image_is_another_pcr0(tmp_path: Path) -> None:
    path = tmp_path / "a.eif"
    path.write_bytes(image())
    good = Policy.from_eif(path)
    changed = PARTS | {"k": Section(SectionType.KERNEL, BytesContent(bytes([KERNEL[0] ^ 1]) + KERNEL[1:]))}
    with path.open("wb") as out:
        eif.write(out, [changed[part] for part in "kcm01"], arch=eif.Arch.X86_64)
    booted = PCRS | dict(good.accepted[0])
    judge(good, pcrs=booted)
    with pytest.raises(AttestationError) as caught:
        judge(Policy.from_eif(path), pcrs=booted)
    assert str(caught.value).startswith("policy: PCR0 is ")


def test_from_locks(tmp_path: Path) -> None:
    path = tmp_path / "enclave.lock"
    measurements = {"PCR0": PCRS[0].hex(), "PCR1": PCRS[1].hex(), "PCR2": PCRS[2].hex()}
    path.write_text(eif.Lock("0.1.0", 0, (), measurements).encode())
    assert judge(Policy.from_lock(path)).matched == {index: PCRS[index] for index in range(3)}
    path.write_text(eif.Lock("0.1.0", 0, (), measurements | {"PCR0": "00" * 48}).encode())
    with pytest.raises(ZeroPcrError):
        Policy.from_lock(path)
    path.write_text(eif.Lock("0.1.0", 0, (), {}).encode())
    with pytest.raises(NoReferenceValuesError):
        Policy.from_lock(path)
    path.write_text("{}")
    with pytest.raises(FormatError):
        Policy.from_lock(path)
    for make in (Policy.from_lock, Policy.from_eif):
        with pytest.raises(FileError):
            make(tmp_path / "none")
        with pytest.raises(NoReferenceValuesError):
            make()
