# SPDX-License-Identifier: Apache-2.0
"""What docs/verify.md shows runs, and what it says of codes is so."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import made_documents
import pytest
from eif_images import image
from made_documents import PCRS, certificates, document, links, root_of
from test_recipient import enveloped, recipient

from enclavekit import attest, errors
from enclavekit.attest.recipient import RecipientKey

PAGE = (Path(__file__).parents[3] / "docs/verify.md").read_text()
NOW = datetime.now(UTC).replace(microsecond=0)
CHAIN = certificates([replace(one, first=NOW - timedelta(hours=1), last=NOW + timedelta(hours=2)) for one in links()])


def fresh(**options: Any) -> bytes:
    pcrs = PCRS | dict(attest.Policy.from_eif("app.eif").accepted[0])
    return document(CHAIN, timestamp=int(NOW.timestamp() * 1000), pcrs=pcrs, **options)


class Connection:
    """What the page calls ``tls``."""

    def getpeercert(self, *, binary_form: bool) -> bytes:
        assert binary_form
        return made_documents.good_chain()[-1]


class Kms:
    """What the page calls ``kms``."""

    def decrypt(self, **words: Any) -> dict[str, bytes]:
        assert set(words["Recipient"]) == {"AttestationDocument", "KeyEncryptionAlgorithm"}
        return {"CiphertextForRecipient": enveloped()}


class Binding:
    """What the page calls ``binding``, of the example."""

    @staticmethod
    def user_data(_: bytes) -> bytes:
        return b"digest of the key"


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("app.eif").write_bytes(image())
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    assert len(blocks[0].splitlines()) == 10
    names: dict[str, Any] = {"ask_the_enclave": lambda nonce: fresh(nonce=nonce, public_key=b"key")}
    monkeypatch.setattr(attest.verifier.Verifier.__init__, "__defaults__", ((root_of(CHAIN),),))
    exec(compile(blocks[0], "docs/verify.md", "exec"), names)  # noqa: S102 - our own page
    assert names["key"] == b"key"
    assert capsys.readouterr().out.startswith(made_documents.MODULE)
    nonce = names["nonce"]
    names |= {"tls": Connection(), "binding": Binding, "document": fresh(nonce=nonce, user_data=b"digest of the key")}
    exec(compile(blocks[1], "docs/verify.md", "exec"), names)  # noqa: S102 - our own page
    pair = recipient()
    monkeypatch.setattr(RecipientKey, "generate", lambda: pair)
    names |= {"kms": Kms(), "blob": b"", "ask_the_nsm": lambda public_key: fresh(public_key=public_key)}
    exec(compile(blocks[2], "docs/verify.md", "exec"), names)  # noqa: S102 - our own page
    assert names["secret"] == b"a data key, or whatever KMS decrypted"


def test_codes_are_of_the_kinds_that_the_page_says() -> None:
    rows = re.findall(r"^\| `(\w+Error)` \| .*?: (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for name, words in rows:
        kinds = {kind.code for kind in getattr(errors, name).__subclasses__()}
        assert set(re.findall(r"`([a-z-]+)`", words)) <= kinds
