# SPDX-License-Identifier: Apache-2.0
"""How an image tells its init what to run: enclavekit's files (docs/init.md), nitro-cli's, or neither."""

from __future__ import annotations

from enum import Enum

from enclavekit.inspection.file_system import FileSystem


class Layout(Enum):
    """Whose init the files in the ramdisks are for."""

    ENCLAVEKIT = "enclavekit"
    NITRO_CLI = "nitro-cli"
    UNKNOWN = "unknown"


def layout_of(files: FileSystem) -> Layout:
    """Told by the names in the root, the surest first."""
    names = set(files.root.children or {})
    if names & {b"cmd", b"env"}:
        return Layout.NITRO_CLI
    if names & {b"config", b"modules"}:
        return Layout.ENCLAVEKIT
    return Layout.NITRO_CLI if b"nsm.ko" in names else Layout.UNKNOWN
