# SPDX-License-Identifier: Apache-2.0
"""The directories of labs, one for each that is up, by its name, for this user alone.

``lock`` is held as long as the lab's process lives, so a directory whose lock is free is a dead lab's, however it died,
and is taken away by whoever looks next.

    lock  state.json  control.sock  agent.sock  device.sock  console.log(.1)  lab.log(.1)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enclavekit.errors import FileError, LabError, NoLabError
from enclavekit.linux.locks import is_locked, locked, try_lock
from enclavekit.linux.private_directory import private_directory

STATE = "state.json"
AGENT = "agent.sock"
DEVICE = "device.sock"
CONSOLE = "console.log"
LOG = "lab.log"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
MAX_STATE_SIZE = 1 << 16

State = dict[str, Any]


@dataclass(slots=True)
class LabDirectory:
    """A lab's own, claimed by this process until ``remove``."""

    path: Path
    _lock: int

    def write_state(self, state: State) -> None:
        """Replace it as a whole. Errors: FileError."""
        beside = self.path / f".{STATE}"
        try:
            beside.write_text(json.dumps(state))
            beside.replace(self.path / STATE)
        except OSError as error:
            raise FileError.of(error, self.path / STATE, "write") from error

    def remove(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def claim(labs: Path, name: str) -> LabDirectory:
    """A new directory. LabError when a lab of this name is up, FileError."""
    if not NAME.fullmatch(name):
        raise LabError(f"name {name[:64]!r}: expected up to 32 letters, digits, '_', '.' and '-'")
    private_directory(labs, hint="remove it, or set XDG_RUNTIME_DIR to a directory of your own")
    path = labs / name
    try:
        with locked(labs / ".lock"):
            _sweep(labs)
            if path.exists():
                raise LabError(f"lab {name}: is up already", hint="enclave lab status, or enclave lab down")
            path.mkdir(mode=0o700)
            lock = try_lock(path / "lock")
    except OSError as error:
        raise FileError.of(error, path, "make the directory") from error
    if lock is None:
        raise LabError(f"{path}: locked by another process as soon as it was made")
    return LabDirectory(path, lock)


def find(labs: Path, name: str) -> tuple[Path, State]:
    """The lab of this name that is up. NoLabError."""
    for path, state in up(labs):
        if path.name == name:
            return path, state
    raise NoLabError(f"lab {name[:64]}: is not up", hint="enclave lab up")


def up(labs: Path) -> list[tuple[Path, State]]:
    """All that are up, with what each says of itself; what dead ones left is taken away."""
    if not labs.is_dir():
        return []
    private_directory(labs, hint="remove it, or set XDG_RUNTIME_DIR to a directory of your own")
    with locked(labs / ".lock"):
        _sweep(labs)
        return [(path, state) for path in _directories(labs) if (state := _read_state(path)) is not None]


def _sweep(labs: Path) -> None:
    for path in _directories(labs):
        with suppress(OSError):
            if not is_locked(path / "lock"):
                shutil.rmtree(path, ignore_errors=True)


def _directories(labs: Path) -> Iterator[Path]:
    return (path for path in sorted(labs.iterdir()) if path.is_dir() and not path.is_symlink())


def _read_state(path: Path) -> State | None:
    try:
        with (path / STATE).open("rb") as file:
            state = json.loads(file.read(MAX_STATE_SIZE))
    except (OSError, ValueError, RecursionError):
        return None  # it is on its way up, or down
    return state if isinstance(state, dict) else None
