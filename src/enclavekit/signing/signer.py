# SPDX-License-Identifier: Apache-2.0
"""One word for a key becomes a signer: a PEM file's path, the ARN of a KMS key, or a pkcs11: URI."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from enclavekit.eif import Signer
from enclavekit.errors import SigningError

KMS_KEY = re.compile(r"arn:aws[-a-z]*:kms:(?P<region>[a-z0-9-]+):[0-9]{12}:key[:/][A-Za-z0-9-]+")


@dataclass(frozen=True, slots=True)
class KeyReference:
    """Where a key is, and what opens it. ``pin`` and ``password`` are never shown."""

    words: str
    module: str | None = None
    pin: str | None = None
    password: str | None = None

    def __repr__(self) -> str:
        return f"KeyReference({self.words!r})"


@contextmanager
def open_signer(reference: KeyReference) -> Iterator[Signer]:
    """The key, as long as the block lasts; SigningError when it cannot be used, MissingError for a lacking library."""
    words = reference.words
    kms_key = KMS_KEY.fullmatch(words)
    if kms_key:
        from enclavekit.signing.kms import KmsSigner

        yield KmsSigner.open(words, kms_key["region"])
    elif words.startswith("arn:"):
        raise SigningError(
            f"{words}: no ARN of a KMS key",
            hint="arn:aws:kms:REGION:ACCOUNT:key/ID; an alias has another ARN than its key",
        )
    elif words.startswith("pkcs11:"):
        from enclavekit.signing.pkcs11 import open_token_key

        with open_token_key(words, module=reference.module, pin=reference.pin) as signer:
            yield signer
    else:
        from enclavekit.signing.pem import PemSigner

        yield PemSigner.open(words, reference.password)
