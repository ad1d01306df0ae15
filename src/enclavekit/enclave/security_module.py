# SPDX-License-Identifier: Apache-2.0
"""The security module that a local enclave gets: what its PCRs are, and who signs for it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from enclavekit.errors import UsageError
from enclavekit.hypervisor.contract import Mode
from enclavekit.linux.private_directory import KEYS_HINT, private_directory
from enclavekit.virtio.nsm import INSTANCE_PCR, ROLE_PCR, Attest, Nsm, text_pcr

HIDDEN_IN_DEBUG = (0, 1, 2, 8)
"""PCRs of the image, which are zero in debug mode, so that no policy takes it for one in production."""

DEFAULT_INSTANCE = "i-00000000000000000"
"""Of local enclaves that were not given one: no instance of EC2's has it."""
INSTANCE_ID = re.compile(r"i-[0-9a-f]{8,17}")


def check_instance_id(text: str) -> str:
    """As EC2 has them: ``i-`` and 8 to 17 hexadecimal digits; UsageError for anything else."""
    if not INSTANCE_ID.fullmatch(text):
        raise UsageError(f"instance id {text[:32]!r}: expected i- and 8 to 17 hexadecimal digits")
    return text


def new_module_id(instance_id: str, enclave_id: str) -> str:
    """As real ones look: the instance, and 16 hexadecimal digits, of which the first are the enclave's id."""
    return f"{instance_id}-enc{enclave_id}{secrets.token_hex(8)}"[: len(instance_id) + len("-enc") + 16]


def security_module(
    directory: Path,
    pcrs: Mapping[int, bytes],
    *,
    enclave_id: str,
    mode: Mode,
    role: str | None = None,
    instance_id: str | None = None,
) -> Nsm:
    """For one enclave. ``pcrs`` are those of its image, ``directory`` the authority's; ``role`` and ``instance_id`` are
    its parent's. Errors: ``FileError``, ``UsageError``. Keys and certificates are made when a document is asked for.
    """
    private_directory(directory, hint=KEYS_HINT)
    instance = check_instance_id(instance_id or DEFAULT_INSTANCE)
    found = {index: value for index, value in pcrs.items() if mode is Mode.PRODUCTION or index not in HIDDEN_IN_DEBUG}
    found[INSTANCE_PCR] = text_pcr(instance)
    if role is not None:
        found[ROLE_PCR] = text_pcr(role)
    module_id = new_module_id(instance, enclave_id)
    return Nsm(module_id, found, _LateSigner(directory, module_id))


class _LateSigner:
    """Most enclaves never ask, and what signs takes a tenth of a second to import."""

    def __init__(self, directory: Path, module_id: str) -> None:
        self._directory, self._module_id = directory, module_id
        self._signer: Attest | None = None

    def __call__(
        self,
        pcrs: Mapping[int, bytes],
        *,
        public_key: bytes | None,
        user_data: bytes | None,
        nonce: bytes | None,
    ) -> bytes:
        """A signed document."""
        if self._signer is None:
            from enclavekit.attest.authority import Authority, DocumentSigner

            self._signer = DocumentSigner(Authority(self._directory), self._module_id)
        return self._signer(pcrs, public_key=public_key, user_data=user_data, nonce=nonce)
