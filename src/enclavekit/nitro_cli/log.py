# SPDX-License-Identifier: Apache-2.0
"""nitro-cli's log, ``nitro_enclaves.log``, which all its processes share, and an ``err<time>.log`` for each failure.

Where nitro-cli's packages are not installed and no directory is named, there is none. A line is
``[id][LEVEL][UTC time, ms][file:line] message``; RUST_LOG is the level.

Source: aws-nitro-enclaves-cli src/common/logger.rs, src/common/mod.rs.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from enclavekit import __version__
from enclavekit.errors import FileError
from enclavekit.nitro_cli.codes import Code
from enclavekit.nitro_cli.command import NitroCliError, printable

FILE = "nitro_enclaves.log"
MODE = 0o766
LEVELS = {
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}
LOG = logging.getLogger("enclavekit.nitro_cli")
LOG.addHandler(logging.NullHandler())
LOG.propagate = False


class _Handler(logging.FileHandler):
    """A log that cannot be written to, on a full disk for example, stops nothing."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say nothing."""


class _Formatter(logging.Formatter):
    """One line a record, whatever its message has in it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        level = {"WARNING": "WARN", "CRITICAL": "ERROR"}.get(record.levelname, record.levelname)
        return (
            f"[{self.name}:{os.getpid()}][{level}][{when}][{record.filename}:{record.lineno}] "
            f"{printable(record.getMessage())}"
        )


def start_log(directory: Path, level: str = "info") -> None:
    """Log to the file in ``directory``. Raises NitroCliError E19 where it cannot be opened."""
    path = directory / FILE
    try:
        handler = _Handler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise NitroCliError(
            Code.FILE_OPERATION, FileError.of(error, path, "open the log").message, file=str(path), operation="Open"
        ) from error
    with suppress(OSError):
        if path.stat().st_uid == os.geteuid():
            path.chmod(MODE)
    stop_log()
    LOG.addHandler(handler)
    LOG.setLevel(LEVELS.get(level.lower(), logging.INFO))
    name_process("nitro-cli")


def name_process(name: str) -> None:
    """What stands before the process's number from now on: ``nitro-cli``, ``enc-xxxxxxx``, then ``enc-<slot>``."""
    for handler in LOG.handlers:
        handler.setFormatter(_Formatter(name))


def stop_log() -> None:
    """Log nowhere."""
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()
    LOG.addHandler(logging.NullHandler())


def backtrace(failure: NitroCliError, action: str) -> str:
    """In nitro-cli's words: what was done, within what, and where in our code it failed."""
    steps = list(_causes(failure))
    frames = traceback.extract_tb(steps[-1].__traceback__)
    lines = ["  Action: " + action, "  Subactions:"]
    lines += [f"    {getattr(step, 'message', None) or step}" for step in steps]
    if frames:
        lines += [f"  Root error file: {Path(frames[-1].filename).name}", f"  Root error line: {frames[-1].lineno}"]
    lines.append(f"  Version: {__version__}")
    return "\n".join(lines)


def _causes(error: BaseException) -> list[BaseException]:
    """From the outermost in; at most a few."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and len(found) < 16:
        found.append(cause)
    return found


def write_error(directory: Path, text: str) -> Path | None:
    """The file of one failure; None where it cannot be written, which is no failure of its own."""
    nanoseconds = time.time_ns()
    when = datetime.fromtimestamp(nanoseconds // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    path = directory / f"err{when}.{nanoseconds % 10**9:09}+00:00.log"
    try:
        with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")
    except OSError:
        return None
    return path
