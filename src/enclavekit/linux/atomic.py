# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all: written beside their place, then renamed (rename(2) is atomic)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from enclavekit.errors import FileError


@contextmanager
def replacing(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A new file, which takes the place of ``path`` when the block ends well; else nothing has changed.

    A symlink stays one, and what it points to is replaced. ``mode`` is for a file that was not there before (the umask
    applies); one that was keeps its own. FileError when the system refuses, also for OSErrors of the block.
    """
    target = Path(os.path.realpath(path))
    beside = target.parent / f".enclavekit-{secrets.token_hex(8)}{target.suffix[:16]}"
    try:
        if target.exists():
            if not target.is_file():
                raise FileError(f"cannot write {path}: not a regular file, expected one or none")
            mode = target.stat().st_mode & 0o777
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "w+b") as out:
            yield out
        if target.exists():
            beside.chmod(mode)
        beside.replace(target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise FileError.of(error, path, "write") from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
