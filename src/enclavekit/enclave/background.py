# SPDX-License-Identifier: Apache-2.0
"""The process of a detached enclave: its own session, no terminal, and one word to whoever started it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from typing import Any, NoReturn

from enclavekit.errors import Error

MAX_WORD = 1 << 16
"""Bytes; more than any first word has."""


def background(work: Callable[[Callable[[dict[str, Any]], None]], None], word_fd: int) -> NoReturn:
    """In a child process that was just forked: do the work, and end.

    What the work tells first, as JSON, goes to ``word_fd``, and then standard input, output and error go nowhere. An
    Error before that is told instead: code, message and hint.
    """
    told = False

    def tell(word: dict[str, Any]) -> None:
        nonlocal told
        if not told:
            told = True
            with contextlib.suppress(OSError):  # whoever waited has gone
                os.write(word_fd, json.dumps(word).encode())
            os.close(word_fd)

    status = 0
    try:
        detach()
        work(tell)
    except Error as error:
        status = 1
        tell({"code": error.code, "message": error.message, "hint": error.hint})
    except BaseException as error:
        status = 1
        tell({"code": "error", "message": f"the enclave's process failed: {type(error).__name__}: {error}"})
    finally:
        os._exit(status)


def detach() -> None:
    """A session of its own, without a terminal; standard input, output and error go nowhere."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def told_error(word: dict[str, Any]) -> Error | None:
    """The error that a first word tells of, if it does."""
    if "message" not in word:
        return None
    kinds = [Error]
    for kind in kinds:
        kinds += kind.__subclasses__()
    kind = next((kind for kind in kinds if kind.code == word.get("code")), Error)
    return kind(str(word["message"]), hint=word.get("hint"))
