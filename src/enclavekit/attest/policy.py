# SPDX-License-Identifier: Apache-2.0
"""What a verifier demands of a document whose signature holds (reference values and policy, RFC 9334 §8).

A genuine document proves that some enclave runs somewhere. Which one is for the policy to say, so there is none that
says nothing: without PCRs, and without the word that any will do, no policy can be made.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from enclavekit import eif
from enclavekit.attest.chain import time_text
from enclavekit.attest.document import MAX_OPTION, PCR_COUNT, PCR_SIZE, Claims, Kind
from enclavekit.eif.lock import MAX_SIZE as MAX_LOCK
from enclavekit.errors import (
    DebugModeError,
    FileError,
    InstanceIdMismatchError,
    KindMismatchError,
    ModuleIdMismatchError,
    NonceMismatchError,
    NoReferenceValuesError,
    PcrMismatchError,
    PublicKeyMismatchError,
    StaleError,
    UserDataMismatchError,
    ZeroPcrError,
)

MAX_AGE_S = 300.0
FUTURE_SKEW_S = 60.0

PcrSet = Mapping[int, bytes]
Name = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """``accepted`` are sets of PCRs, 48 bytes each by number: one set must hold whole, so several let builds roll over.

    None of the others is looked at when it is None. ``max_age_s`` is the time since the document was made, when it is
    judged now or at a given time; it may be 60 s younger than the clock says. ``any_measurement`` is the only way to
    accept whatever image runs. In debug mode PCR0, PCR1, PCR2 and PCR8 are zero whatever runs, so ``allow_debug`` is of
    use only where none of them is demanded. ``ignore_unknown`` lets documents have fields that are not known here; they
    are signed, and not returned.

    NoReferenceValuesError or ZeroPcrError for a policy that would let anything pass.
    """

    accepted: Sequence[PcrSet] = ()
    any_measurement: bool = False
    kind: Kind = Kind.ENCLAVE
    max_age_s: float = MAX_AGE_S
    nonce: bytes | None = None
    user_data: bytes | None = None
    public_key: bytes | None = None
    module_id: str | None = None
    instance_id: str | None = None
    allow_debug: bool = False
    ignore_unknown: bool = False

    def __post_init__(self) -> None:
        accepted = tuple(MappingProxyType(dict(values)) for values in self.accepted)
        object.__setattr__(self, "accepted", accepted)
        if self.any_measurement and accepted:
            raise ValueError("a policy that accepts any measurement has no PCRs")
        if not self.any_measurement and not (accepted and all(accepted)):
            raise NoReferenceValuesError(
                "policy: no PCR to compare with, so that every enclave would pass",
                hint="name the image, its lock or its PCRs; or say that any measurement will do",
            )
        for values in accepted:
            _check_reference(values)
        if not 0 < self.max_age_s < math.inf:
            raise ValueError(f"max_age_s is {self.max_age_s}, expected seconds")
        for name in ("nonce", "user_data", "public_key"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bytes):
                raise TypeError(f"{name} is {type(value).__name__}, expected bytes")
            if value is not None and len(value) > MAX_OPTION:
                raise ValueError(f"{name} of {len(value)} bytes, which no document can have")
        if self.nonce == b"":
            raise ValueError("an empty nonce, which would prove nothing")

    @classmethod
    def from_eif(cls, *images: Name, **demands: Any) -> Self:  # noqa: ANN401 - the fields of the class
        """Accept the enclaves of these images: PCR0, PCR1, PCR2, and PCR8 when signed. The files are read whole.

        Other fields are keyword arguments. An image that hypervisors would refuse is an EifError or SignatureError.
        """
        return cls(accepted=[eif_pcrs(image) for image in images], **demands)

    @classmethod
    def from_lock(cls, *locks: Name, **demands: Any) -> Self:  # noqa: ANN401 - the fields of the class
        """The same of what ``enclave.lock`` files say; FormatError for other files. Nothing in a lock is signed."""
        return cls(accepted=[lock_pcrs(lock) for lock in locks], **demands)

    def check_kind(self, claims: Claims) -> None:
        """KindMismatchError unless it is the kind demanded."""
        if claims.kind is not self.kind:
            raise KindMismatchError(
                f"policy: a document of kind {claims.kind.label}, expected {self.kind.label}",
                hint="any EC2 instance with a NitroTPM has documents of the same root; they do not speak for enclaves",
            )

    def check_age(self, claims: Claims, at_ms: int) -> None:
        """StaleError unless the document is young at that time."""
        age_s = (at_ms - claims.timestamp_ms) / 1000
        if -FUTURE_SKEW_S <= age_s <= self.max_age_s:
            return
        made = time_text(claims.timestamp_ms)
        if age_s > self.max_age_s:
            raise StaleError(f"policy: made {made}, {age_s:.0f} s ago, expected at most {self.max_age_s:g} s")
        raise StaleError(
            f"policy: made {made}, {-age_s:.0f} s in the future",
            hint="is this machine's clock right?",
        )

    def check_debug(self, claims: Claims) -> None:
        """DebugModeError for an enclave in debug mode, unless allowed."""
        if claims.debug and not self.allow_debug:
            raise DebugModeError(
                "policy: the enclave runs in debug mode: its parent reads its console and memory",
                hint="run it without debug mode; to accept it all the same, for a test: --allow-debug",
            )

    def check_pcrs(self, claims: Claims) -> PcrSet:
        """The accepted set that holds; PcrMismatchError when none does."""
        first: PcrMismatchError | None = None
        for values in self.accepted:
            error = _compare(values, claims)
            if error is None:
                return values
            first = first or error
        if first is None:
            return {}
        if len(self.accepted) > 1:
            raise PcrMismatchError(
                f"{first.message}; nor does any other of the {len(self.accepted)} accepted sets hold"
            )
        raise first

    def check_options(self, claims: Claims) -> None:
        """Nonce, user data and public key, and who it is."""
        for name, error in _OPTIONS:
            _check_option(name, getattr(claims, name), getattr(self, name), error)
        if self.module_id not in {None, claims.module_id}:
            raise ModuleIdMismatchError(f"policy: module {claims.module_id}, expected {self.module_id}")
        if self.instance_id not in {None, claims.instance_id}:
            raise InstanceIdMismatchError(f"policy: instance {claims.instance_id}, expected {self.instance_id}")


_OPTIONS = (
    ("nonce", NonceMismatchError),
    ("user_data", UserDataMismatchError),
    ("public_key", PublicKeyMismatchError),
)


def pcr_of_text(text: str) -> bytes:
    """PCR3 of an IAM role's ARN, PCR4 of an instance id: SHA-384(48 zero bytes ‖ text)."""
    return hashlib.sha384(bytes(PCR_SIZE) + text.encode()).digest()


def eif_pcrs(image: Name) -> dict[int, bytes]:
    """Of an image's enclaves: PCR0, PCR1, PCR2, and PCR8 when it is signed."""
    try:
        file = Path(image).open("rb")  # noqa: SIM115 - errors of reading are not of opening
    except OSError as error:
        raise FileError.of(error, image, "read") from error
    with file:
        examined = eif.examine(file, os.fspath(image), strict=True)
    return _numbered(examined.measurements)


def lock_pcrs(lock: Name) -> dict[int, bytes]:
    """The same of an ``enclave.lock``."""
    try:
        with Path(lock).open("rb") as file:
            data = file.read(MAX_LOCK + 1)
    except OSError as error:
        raise FileError.of(error, lock, "read") from error
    return _numbered(eif.Lock.parse(data).measurements)


def _numbered(measurements: Mapping[str, str]) -> dict[int, bytes]:
    found = {name: value for name, value in measurements.items() if name.startswith("PCR")}
    return {int(name.removeprefix("PCR")): bytes.fromhex(value) for name, value in found.items()}


def _check_reference(values: PcrSet) -> None:
    for index, value in values.items():
        if not 0 <= index < PCR_COUNT or len(value) != PCR_SIZE:
            raise ValueError(f"PCR{index} of {len(value)} bytes, expected PCR0 to PCR{PCR_COUNT - 1} of {PCR_SIZE}")
        if not any(value):
            raise ZeroPcrError(
                f"policy: PCR{index} is expected to be zeros",
                hint="PCRs of zeros are those of enclaves in debug mode, or of nothing: take them from the image",
            )


def _compare(expected: PcrSet, claims: Claims) -> PcrMismatchError | None:
    for index, value in sorted(expected.items()):
        found = claims.pcrs.get(index)
        if found == value:
            continue
        shown = "not in the document" if found is None else f"{found.hex()[:16]}…"
        hint = None
        if claims.debug and index in {0, 1, 2, 8}:
            hint = "in debug mode PCR0, PCR1, PCR2 and PCR8 are zeros, whatever image runs"
        return PcrMismatchError(f"policy: PCR{index} is {shown}, expected {value.hex()[:16]}…", hint=hint)
    return None


def _check_option(
    name: str,
    found: bytes | None,
    expected: bytes | None,
    error: type[NonceMismatchError | UserDataMismatchError | PublicKeyMismatchError],
) -> None:
    if expected is None or found == expected:
        return
    shown = "not in the document" if found is None else f"{len(found)} bytes, {found.hex()[:16]}…"
    raise error(f"policy: {name} is {shown}, expected {len(expected)} bytes, {expected.hex()[:16]}…")
