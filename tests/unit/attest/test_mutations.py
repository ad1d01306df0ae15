# SPDX-License-Identifier: Apache-2.0
"""Every byte of three good documents, changed: each is refused.

``tests/fuzz/mutations.py`` does the same with documents that AWS has signed, and with more values a byte. What no byte
alone can do, and is not refused, is the other signature that ECDSA allows, (R, n - S).
"""

from __future__ import annotations

from functools import cache

import pytest
from made_documents import MADE, PCRS, Key, certificates, document, encode, envelope, links, payload, root_of, sign

from enclavekit.attest import Policy, Verifier
from enclavekit.errors import AttestationError

PARTS = 4
"""Tests a document: they run side by side."""
POLICY = Policy(accepted=[{index: PCRS[index] for index in range(3)}])


@cache
def chain() -> tuple[bytes, ...]:
    """As short as one may be: the more bytes, the longer this takes."""
    first, *_, last = links()
    return certificates([first, last])


def forms() -> dict[str, bytes]:
    """One as enclaves have it, one without options, one in the older form."""
    key: Key = links()[4].key
    pcrs = {index: PCRS[index] for index in range(5)}
    older = encode(payload(chain(), pcrs=pcrs), indefinite=False)
    return {
        "whole chain": document(nonce=b"n" * 32, user_data=b"", public_key=b"k" * 91, pcrs=pcrs),
        "absent": document(chain(), nonce=..., user_data=..., public_key=..., pcrs=pcrs),
        "definite": envelope(older, sign(older, key)),
    }


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("form", ["whole chain", "absent", "definite"])
def test_every_byte_counts(form: str, part: int) -> None:
    good = forms()[form]
    verifier = Verifier([root_of(), root_of(chain())], clock=lambda: MADE)
    verifier.verify(good, POLICY)
    for at in range(part, len(good), PARTS):
        changed = bytearray(good)
        changed[at] ^= 1 << at % 8
        with pytest.raises(AttestationError):
            verifier.verify(bytes(changed), POLICY)
