# SPDX-License-Identifier: Apache-2.0
"""The directories of enclaves: <runtime>/<id>/ while one runs, <runtime>/ended/<id>/ when it has ended.

``lock`` is held as long as the enclave's process lives, so a directory whose lock is free is a dead enclave's, however
it died: whoever looks next moves it to the ended ones. Of those the latest MAX_ENDED are kept.

    lock  state.json  control.sock  vsock.sock  output.log(.1)  console.log(.1)
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enclavekit.errors import FileError, LaunchError, NoEnclaveError
from enclavekit.linux.locks import is_locked, locked, try_lock
from enclavekit.linux.private_directory import private_directory

FIRST_CID = 16
LAST_CID = 0xFFFF_FFFE
"""VMADDR_CID_ANY is one more."""

PARENT = "parent"
ENDED = "ended"
STATE = "state.json"
CONTROL = "control.sock"
OUTPUT = "output.log"
CONSOLE = "console.log"
MAX_STATE_SIZE = 1 << 16
MAX_ENDED = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

State = dict[str, Any]


@dataclass(slots=True)
class EnclaveDirectory:
    """One enclave's own directory, claimed by this process until ``remove`` or ``end``."""

    path: Path
    enclave_id: str
    cid: int
    _lock: int
    _state: State = field(default_factory=dict)

    def write_state(self, **state: Any) -> None:  # noqa: ANN401 - JSON
        """Add to state.json, which is replaced as a whole. Raises FileError."""
        self._state |= state
        try:
            _write_state(self.path, self._state)
        except OSError as error:
            raise FileError.of(error, self.path / STATE, "write") from error

    @property
    def state(self) -> State:
        """What is known of it."""
        return dict(self._state)

    def end(self, **state: Any) -> None:  # noqa: ANN401 - JSON
        """It has ended: give id and CID back, keep what is worth knowing. A full disk loses no more than that."""
        # Whoever looks sees it among those that run, with all it has, or among the ended ones.
        with suppress(OSError), locked(self.path.parent / "lock"):
            with suppress(FileError):
                self.write_state(state="ended", ended=time.time(), order=_next_order(self.path.parent), **state)
            _retire(self.path)
        os.close(self._lock)

    def remove(self) -> None:
        """Give id and CID back, and leave nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def own_directory(path: Path) -> None:
    """``private_directory`` for what is there as long as this user is logged in."""
    private_directory(path, hint="remove it, or set XDG_RUNTIME_DIR to a directory of your own")


def prepare(runtime: Path) -> None:
    """Make the directory of all enclaves; FileError as ``own_directory``."""
    own_directory(runtime)
    for name in (PARENT, ENDED):
        try:
            (runtime / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise FileError.of(error, runtime / name, "make the directory") from error


def claim(
    runtime: Path, cid: int | None = None, name: str | None = None, *, numbered: bool = False
) -> EnclaveDirectory:
    """A new id, its directory, and a CID that no living enclave has: the lowest from 16 on unless one is given.

    The name, its id unless one is given, is nobody else's either; ``numbered``, one that is gets _1, _2 and so on.
    """
    prepare(runtime)
    with locked(runtime / "lock"):
        cid, name = _free(runtime, cid, name, numbered=numbered)
        enclave_id = secrets.token_hex(4)
        path = runtime / enclave_id
        lock = None
        try:
            path.mkdir(mode=0o700)
            lock = try_lock(path / "lock")
            if lock is None:
                raise LaunchError(f"{path}: locked by another process as soon as it was made")
            directory = EnclaveDirectory(path, enclave_id, cid, lock)
            directory.write_state(
                id=enclave_id, name=name or enclave_id, cid=cid, pid=os.getpid(), state="starting", started=time.time()
            )
        except BaseException as error:
            shutil.rmtree(path, ignore_errors=True)
            if lock is not None:
                os.close(lock)
            if isinstance(error, OSError):
                raise FileError.of(error, path, "make the directory") from error
            raise
    return directory


def claimable(runtime: Path, cid: int | None = None, name: str | None = None) -> int:
    """The CID that ``claim`` would take now. LaunchError, FileError as there."""
    prepare(runtime)
    with locked(runtime / "lock"):
        return _free(runtime, cid, name)[0]


def unique_name(wanted: str, taken: Container[str]) -> str:
    """``wanted``, or with the first of _1, _2... that nobody has."""
    name, number = wanted, 0
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def _free(runtime: Path, cid: int | None, name: str | None, *, numbered: bool = False) -> tuple[int, str | None]:
    """Hold the lock of ``runtime``."""
    if name is not None and not NAME.fullmatch(name):
        raise LaunchError(f"name {name[:64]!r}: expected up to 64 letters, digits, '_', '.' and '-'")
    states = _living(runtime)
    taken = {state.get("cid"): state.get("id") for state in states}
    if cid is None:
        cid = next(number for number in range(FIRST_CID, LAST_CID) if number not in taken)
    elif cid in taken:
        raise LaunchError(f"CID {cid}: enclave {taken[cid]} has it", hint="leave --cid out to get a free one")
    if numbered and name is not None:
        name = unique_name(name, {str(state.get(key)) for state in states for key in ("name", "id")})
    for state in states:
        if name is not None and name in (state.get("name"), state.get("id")):
            raise LaunchError(f"name {name}: enclave {state.get('id')} has it", hint="enclave ps shows all")
    return cid, name


def running(runtime: Path) -> list[State]:
    """The states of all enclaves that run, the oldest first; those that died without a word become ended ones."""
    if not runtime.is_dir():
        return []
    prepare(runtime)
    with locked(runtime / "lock"):
        return _living(runtime)


def ended(runtime: Path) -> list[State]:
    """The states of the last that have ended, the latest last."""
    found = []
    with suppress(FileNotFoundError):
        for path in (runtime / ENDED).iterdir():
            state = _read_state(path)
            if state is not None:
                found.append({**state, "state": "ended"})  # its last words may have found a full disk
    return sorted(found, key=_order)


def find(runtime: Path, named: str, *, also_ended: bool = False) -> tuple[Path, State]:
    """By name or id: one that runs or, if there is none, the last that did. NoEnclaveError."""
    states = running(runtime)
    for state in states:
        if named in (state.get("name"), state.get("id")):
            return runtime / str(state["id"]), state
    past = [state for state in ended(runtime) if named in (state.get("name"), state.get("id"))]
    if past and also_ended:
        return runtime / ENDED / str(past[-1]["id"]), past[-1]
    if past:
        raise NoEnclaveError(f"enclave {named[:64]!r}: has ended ({past[-1].get('reason')})", hint="enclave ps --all")
    raise NoEnclaveError(f"enclave {named[:64]!r}: none has that name or id", hint="enclave ps shows all that run")


def is_running(path: Path) -> bool:
    """Whether the enclave in this directory still is."""
    return is_locked(path / "lock")


def _living(runtime: Path) -> list[State]:
    """Hold the lock of ``runtime``."""
    found = []
    for path in runtime.iterdir():
        if path.name in (PARENT, ENDED) or not path.is_dir():
            continue
        try:
            lock = try_lock(path / "lock")
        except OSError:  # it ends just now
            continue
        state = _read_state(path)
        if lock is not None:
            if state is None:
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    ending = {"state": "ended", "ended": time.time(), "order": _next_order(runtime), "reason": "killed"}
                    _write_state(path, {**state, **ending})
                if isinstance(state.get("cgroup"), str):
                    with suppress(OSError, ValueError):
                        Path(state["cgroup"]).rmdir()
                _retire(path)
            os.close(lock)
        elif state is not None:  # else between its making and its first state
            found.append(state)
    return sorted(found, key=lambda state: _number(state, "started"))


def _retire(path: Path) -> None:
    """Move it to the ended ones, without what only a running one has."""
    with suppress(OSError):
        for entry in path.iterdir():
            if entry.is_socket() or entry.name.startswith("."):
                entry.unlink(missing_ok=True)
    past = path.parent / ENDED
    try:
        path.rename(past / path.name)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        kept = sorted(past.iterdir(), key=lambda entry: _order(_read_state(entry) or {}))
        for entry in kept[:-MAX_ENDED]:
            shutil.rmtree(entry, ignore_errors=True)


def _read_state(path: Path) -> State | None:
    try:
        with (path / STATE).open("rb") as file:
            state = json.loads(file.read(MAX_STATE_SIZE))
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) and state.get("id") == path.name else None


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    beside = path / f".{STATE}"
    beside.write_text(json.dumps(state))
    beside.replace(path / STATE)


def _order(state: State) -> float:
    """Which ended after which: a count, for the clock of the day may have been set back in between."""
    return _number(state, "order")


def _next_order(runtime: Path) -> float:
    """Hold the lock of ``runtime``."""
    return max((_order(state) for state in ended(runtime)), default=0) + 1


def _number(state: State, key: str) -> float:
    value = state.get(key)
    return float(value) if isinstance(value, int | float) else 0.0
