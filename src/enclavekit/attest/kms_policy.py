# SPDX-License-Identifier: Apache-2.0
"""The condition block of a KMS key policy, or an IAM policy, that lets only certain enclaves use a key.

Source: AWS KMS developer guide "Condition keys for AWS Nitro Enclaves". Values are strings, compared without regard to
case. Without a document in the request the keys are not there, and the condition is not met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from enclavekit.errors import NoReferenceValuesError, ZeroPcrError

OPERATOR = "StringEqualsIgnoreCase"
IMAGE = "kms:RecipientAttestation:ImageSha384"
"""PCR0."""
_PCR = "kms:RecipientAttestation:PCR"


def condition(accepted: Sequence[Mapping[int, bytes]], numbers: Sequence[int]) -> dict[str, Any]:
    """Of several sets of PCRs, those of these numbers; each key must have the value of one of the sets.

    With several sets and several numbers KMS also accepts one set's PCR beside another's. NoReferenceValuesError when
    nothing is left to compare, or a set has no such PCR; ZeroPcrError for a PCR of zeros, which every enclave in debug
    mode has.
    """
    if not accepted or not numbers:
        raise NoReferenceValuesError("policy: no PCR to compare with, so that every enclave would pass")
    keys: dict[str, str | list[str]] = {}
    for number in sorted(set(numbers)):
        values = []
        for pcrs in accepted:
            if number not in pcrs:
                raise NoReferenceValuesError(
                    f"policy: the image has no PCR{number}",
                    hint="PCR8 is there when an image is signed, PCR3 and PCR4 when --role and --instance-id say which",
                )
            if not any(pcrs[number]):
                raise ZeroPcrError(
                    f"policy: PCR{number} is expected to be zeros",
                    hint="every enclave in debug mode has such a PCR, and could use the key",
                )
            values.append(pcrs[number].hex())
        different = list(dict.fromkeys(values))
        keys[IMAGE if number == 0 else f"{_PCR}{number}"] = different[0] if len(different) == 1 else different
    return {OPERATOR: keys}
