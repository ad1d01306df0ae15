# SPDX-License-Identifier: Apache-2.0
"""The reader of documents: what it sees in genuine ones, and by which rule it refuses others."""

from __future__ import annotations

from base64 import b64encode, urlsafe_b64encode
from typing import Any

import pytest
from attestation_data import REAL, needs_documents, real

from enclavekit.attest.document import Document, Kind
from enclavekit.errors import AttestationError, DocumentError, DocumentTooLargeError


@needs_documents
@pytest.mark.parametrize("entry", real())
def test_a_genuine_document_says_what_is_known_of_it(entry: dict[str, Any]) -> None:
    document = Document.parse((REAL / entry["file"]).read_bytes())
    claims = document.unverified
    assert bytes(document) == (REAL / entry["file"]).read_bytes()
    assert (claims.module_id, claims.timestamp_ms) == (entry["module_id"], entry["timestamp_ms"])
    assert (claims.kind.label, claims.debug) == (entry["kind"], entry["debug_mode"])
    assert {str(index): value.hex() for index, value in claims.pcrs.items()} == entry["pcrs"]


@needs_documents
def test_text_forms_are_the_same_document() -> None:
    raw = next(REAL.glob("0114_*.bin")).read_bytes()
    forms = (raw, b64encode(raw), urlsafe_b64encode(raw).rstrip(b"="), raw.hex().encode(), raw.hex("\n", 32).encode())
    for form in forms:
        assert Document.parse_text(form).raw == raw
    assert Document.parse_text(raw).unverified.kind is Kind.ENCLAVE


@pytest.mark.parametrize("text", [b"", b"!", b"abc", b"hello, world"])
def test_text_that_is_no_document(text: bytes) -> None:
    with pytest.raises(DocumentError):
        Document.parse_text(text)


def test_a_document_has_a_largest_size() -> None:
    with pytest.raises(DocumentTooLargeError) as caught:
        Document.parse(bytes(32769))
    assert str(caught.value) == "document: 32769 bytes, expected at most 32768"
    with pytest.raises(AttestationError):
        Document.parse_text(b"a" * 100_000)
