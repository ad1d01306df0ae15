# SPDX-License-Identifier: Apache-2.0
"""The security module that a local enclave gets: what its PCRs are, and who signs for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from enclavekit.attest.authority import (
    DEFAULT_INSTANCE,
    Authority,
    DocumentSigner,
    check_instance_id,
    new_module_id,
    prepare_directory,
)
from enclavekit.hypervisor.contract import Mode
from enclavekit.virtio.nsm import INSTANCE_PCR, ROLE_PCR, Nsm, text_pcr

HIDDEN_IN_DEBUG = (0, 1, 2, 8)
"""PCRs of the image, which are zero in debug mode, so that no policy takes it for one in production."""


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
    prepare_directory(directory)
    instance = check_instance_id(instance_id or DEFAULT_INSTANCE)
    found = {index: value for index, value in pcrs.items() if mode is Mode.PRODUCTION or index not in HIDDEN_IN_DEBUG}
    found[INSTANCE_PCR] = text_pcr(instance)
    if role is not None:
        found[ROLE_PCR] = text_pcr(role)
    module_id = new_module_id(instance, enclave_id)
    return Nsm(module_id, found, DocumentSigner(Authority(directory), module_id))
