# SPDX-License-Identifier: Apache-2.0
"""The directory of each running enclave: <runtime>/<id>/, with its state and sockets.

``lock`` is held as long as the enclave's process lives, so a directory whose lock is free is a dead enclave's, however
it died; it is swept by the next launch.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enclavekit.errors import FileError, LaunchError
from enclavekit.linux.locks import locked, try_lock

FIRST_CID = 16
LAST_CID = 0xFFFF_FFFE
"""VMADDR_CID_ANY is one more."""

PARENT = "parent"
STATE = "state.json"
MAX_STATE_SIZE = 1 << 16


@dataclass(slots=True)
class EnclaveDirectory:
    """One enclave's own directory, claimed by this process until ``remove``."""

    path: Path
    enclave_id: str
    cid: int
    _lock: int

    def write_state(self, **state: Any) -> None:  # noqa: ANN401 - JSON
        """Replace state.json, as a whole."""
        _write_state(self.path, {"id": self.enclave_id, "cid": self.cid, "pid": os.getpid(), **state})

    def remove(self) -> None:
        """Give id and CID back."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def prepare(runtime: Path) -> None:
    """Make the directory of all enclaves; refuse one that others could write to or put in our way."""
    try:
        runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = runtime.lstat()
    except OSError as error:
        raise FileError.of(error, runtime, "make the directory") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise FileError(
            f"{runtime}: mode {stat.filemode(found.st_mode)}, owner {found.st_uid}, expected a directory of "
            f"user {os.getuid()} with mode drwx------",
            hint="remove it, or set XDG_RUNTIME_DIR to a directory of your own",
        )
    try:
        (runtime / PARENT).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise FileError.of(error, runtime / PARENT, "make the directory") from error


def claim(runtime: Path, cid: int | None = None) -> EnclaveDirectory:
    """A new id, its directory, and a CID that no living enclave has: the lowest from 16 on unless one is given."""
    prepare(runtime)
    with locked(runtime / "lock"):
        taken = {state.get("cid"): state.get("id") for state in living(runtime)}
        if cid is None:
            cid = next(number for number in range(FIRST_CID, LAST_CID) if number not in taken)
        elif cid in taken:
            raise LaunchError(f"CID {cid}: enclave {taken[cid]} has it", hint="leave --cid out to get a free one")
        enclave_id = secrets.token_hex(4)
        path = runtime / enclave_id
        lock = None
        try:
            path.mkdir(mode=0o700)
            lock = try_lock(path / "lock")
            if lock is None:
                raise LaunchError(f"{path}: locked by another process as soon as it was made")
            directory = EnclaveDirectory(path, enclave_id, cid, lock)
            directory.write_state(state="starting")
        except BaseException as error:
            shutil.rmtree(path, ignore_errors=True)
            if lock is not None:
                os.close(lock)
            if isinstance(error, OSError):
                raise FileError.of(error, path, "make the directory") from error
            raise
    return directory


def living(runtime: Path) -> Iterator[dict[str, Any]]:
    """The states of all enclaves that run; dead ones' directories are removed. Hold the lock of ``runtime``."""
    for path in sorted(runtime.iterdir()):
        if path.name == PARENT or not path.is_dir():
            continue
        try:
            lock = try_lock(path / "lock")
        except (FileNotFoundError, NotADirectoryError):  # it ends just now
            continue
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            continue
        try:
            state = json.loads((path / STATE).read_bytes()[:MAX_STATE_SIZE])
        except (OSError, ValueError):  # between its making and its first state
            continue
        if isinstance(state, dict):
            yield state


def _write_state(path: Path, state: dict[str, Any]) -> None:
    beside = path / f".{STATE}"
    beside.write_text(json.dumps(state))
    beside.replace(path / STATE)
