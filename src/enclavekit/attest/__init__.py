# SPDX-License-Identifier: Apache-2.0
"""Attestation documents: read strictly, verified against a pinned root, judged by a policy.

    verified = Verifier().verify(document, Policy.from_eif("app.eif", nonce=nonce))
    print(verified.module_id, verified.public_key)

``docs/verify.md`` says what that proves, and what not.
"""

from enclavekit.attest.document import Claims, Document, Kind
from enclavekit.attest.policy import Policy, pcr_of_text
from enclavekit.attest.roots import AWS, AWS_ROOTS, AWS_US_GOV, Root
from enclavekit.attest.verifier import Moment, Verified, Verifier

__all__ = [
    "AWS",
    "AWS_ROOTS",
    "AWS_US_GOV",
    "Claims",
    "Document",
    "Kind",
    "Moment",
    "Policy",
    "Root",
    "Verified",
    "Verifier",
    "pcr_of_text",
]
