# SPDX-License-Identifier: Apache-2.0
"""A directory for this user alone, for sockets and keys."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from enclavekit.errors import FileError

KEYS_HINT = "keys are in it: make it yours with mode 0700, and remove it if others could read them"


def private_directory(path: Path, *, hint: str) -> None:
    """Make it, or see that it is one. FileError with the hint where others could look into it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise FileError.of(error, path, "make the directory") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise FileError(
            f"{path}: mode {stat.filemode(found.st_mode)}, owner {found.st_uid}, expected a directory of "
            f"user {os.geteuid()} with mode drwx------",
            hint=hint,
        )
