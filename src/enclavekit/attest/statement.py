# SPDX-License-Identifier: Apache-2.0
"""What a verified document proves, and what it does not, in sentences; and documents as objects for JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from enclavekit.attest.document import Claims, Document, Kind
from enclavekit.attest.verifier import Moment, Verified

SCHEMA = 1
_IMAGE_PCRS = {
    Kind.ENCLAVE: {0: "the image", 8: "the image's signer", 2: "the application", 1: "kernel and first ramdisk"},
    Kind.NITROTPM: {4: "what booted", 7: "the secure-boot policy", 12: "the kernel's command line"},
}
_OTHER_PCRS = {3: "the instance's role", 4: "the instance"}
_SHOWN = 16


def proven(verified: Verified) -> list[tuple[str, str]]:
    """A word and what is so."""
    enclave = verified.kind is Kind.ENCLAVE
    signer = "a root for development" if verified.root.development else verified.root.name
    found = [
        ("signed", f"by {verified.module_id}, for which {signer} vouches ({verified.root.sha256.hex()[:_SHOWN]}…)"),
        *(
            (f"PCR{index}", f"{value.hex()[:_SHOWN]}…, as expected{_meaning(verified.kind, index)}")
            for index, value in sorted(verified.matched.items())
        ),
    ]
    if enclave and not verified.debug:
        found.append(("mode", "not in debug mode"))
    if verified.policy.nonce is not None:
        found.append(("nonce", "the one asked for: made after it was chosen"))
    if verified.moment is not Moment.DOCUMENT:
        age_s = (verified.at - verified.made).total_seconds()
        found.append(("made", f"{_time(verified.made)}, {age_s:.0f} s before the time asked about"))
    for label, expected in (("user data", verified.policy.user_data), ("public key", verified.policy.public_key)):
        if expected is not None:
            found.append((label, f"{len(expected)} bytes, as expected"))
    return found


def not_proven(verified: Verified) -> list[str]:
    """What somebody could take for proven, and is not."""
    found = []
    if verified.root.development:
        found.append("anything about hardware: whoever can read the development keys can sign what they like")
    if not any(index in verified.matched for index in _IMAGE_PCRS[verified.kind]):
        found.append("what runs: no PCR of the image was compared")
    if verified.debug:
        found.append("secrecy: in debug mode the parent reads console and memory, and no image is measured")
    if verified.moment is Moment.DOCUMENT:
        found.append("that it is fresh: it was judged at its own time, and may be shown again for ever")
    elif verified.moment is Moment.GIVEN:
        found.append("anything about now: it was judged at a time that was given")
    elif verified.policy.nonce is None:
        found.append(
            f"that it was made for you: without a nonce it can be replayed for {verified.policy.max_age_s:g} s"
        )
    found.extend(
        f"{label}: it is there, and was compared with nothing"
        for label, value, expected in (
            ("the public key", verified.public_key, verified.policy.public_key),
            ("the user data", verified.user_data, verified.policy.user_data),
        )
        if value is not None and expected is None
    )
    found.append("that your connection ends in the enclave: compare its key with one in the document")
    return found


def verified_object(verified: Verified) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "schema": SCHEMA,
        "verified": True,
        "root": {
            "name": verified.root.name,
            "sha256": verified.root.sha256.hex(),
            "development": verified.root.development,
        },
        "judged_at": verified.at.isoformat(),
        "moment": verified.moment.value,
        "expires": verified.expires.isoformat(),
        "matched": {f"PCR{index}": value.hex() for index, value in sorted(verified.matched.items())},
        "proven": [f"{label}: {text}" for label, text in proven(verified)],
        "not_proven": not_proven(verified),
        "document": claims_object(verified.document.unverified),
    }


def unverified_object(document: Document) -> dict[str, Any]:
    """The same of one that nobody has verified."""
    return {"schema": SCHEMA, "verified": False, "document": claims_object(document.unverified)}


def claims_object(claims: Claims) -> dict[str, Any]:
    """Bytes as hexadecimal digits."""
    return {
        "kind": claims.kind.label,
        "module_id": claims.module_id,
        "instance_id": claims.instance_id,
        "timestamp_ms": claims.timestamp_ms,
        "made": made_text(claims),
        "debug": claims.debug,
        "pcrs": {f"PCR{index}": value.hex() for index, value in sorted(claims.pcrs.items())},
        "public_key": _hex(claims.public_key),
        "user_data": _hex(claims.user_data),
        "nonce": _hex(claims.nonce),
    }


def made_text(claims: Claims) -> str | None:
    """The timestamp as a date; None for one that no calendar has."""
    try:
        return datetime.fromtimestamp(claims.timestamp_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):
        return None


def _meaning(kind: Kind, index: int) -> str:
    meaning = _IMAGE_PCRS[kind].get(index) or (_OTHER_PCRS.get(index) if kind is Kind.ENCLAVE else None)
    return f": {meaning}" if meaning else ""


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()
