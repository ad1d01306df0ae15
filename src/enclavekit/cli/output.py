# SPDX-License-Identifier: Apache-2.0
"""What every command prints, and how: results on stdout, words on stderr, errors in one shape, exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import click

from enclavekit.errors import AttestationError, Error, LockedError, MissingError, UsageError

if TYPE_CHECKING:
    from rich.console import Console


class Exit(IntEnum):
    """Exit codes of every command but foreground ``run``, which gives the application's."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    TROUBLE = 2  # of diff, which differs with 1
    DIFFERS = 3
    NOT_VERIFIED = 3  # of verify
    MISSING = 4
    TIMED_OUT = 124
    RUN_FAILED = 125


@dataclass(slots=True)
class Output:
    """How this invocation was asked to speak."""

    json: bool = False
    quiet: bool = False
    verbose: int = 0

    @property
    def stderr(self) -> Console:
        """For progress and words; colours and bars only on a terminal, and never with NO_COLOR."""
        from rich.console import Console

        return Console(stderr=True, highlight=False, soft_wrap=True, quiet=self.quiet)

    def show(self, value: Any, render: Callable[[Console], None]) -> None:
        """Print a result: as JSON when asked for, else as text for people (colours on a terminal, as with stderr)."""
        if self.json:
            self.result(value)
            return
        from rich.console import Console

        if sys.stdout is None:  # closed by whoever started us
            return
        # A pipe has no width: what is wider than a terminal must not be broken there.
        width = None if sys.stdout.isatty() else 250
        render(Console(highlight=False, soft_wrap=True, width=width))

    def result(self, value: Any) -> None:
        """Print the result as JSON."""
        text = json.dumps(value, indent=2, ensure_ascii=False)
        click.echo(text.encode("utf-8", "backslashreplace"))

    def result_text(self, text: str) -> None:
        """Print a result that is one word."""
        click.echo(text)

    def say(self, text: str) -> None:
        """A line on stderr, unless quiet."""
        if not self.quiet:
            click.echo(f"enclave: {text}", err=True)

    def detail(self, text: str) -> None:
        """A line on stderr with -v."""
        if self.verbose:
            self.say(text)

    def error(self, error: Error) -> None:
        """An error: two lines for people, one object for machines."""
        if self.json:
            body = {"code": error.code, "message": error.message, "hint": error.hint}
            click.echo(json.dumps({"error": body}, ensure_ascii=False), err=True)
            return
        click.echo(f"enclave: {printable(error.message)}", err=True)
        if error.hint:
            click.echo(f"hint: {printable(error.hint)}", err=True)


def printable(text: str) -> str:
    """Hostile text without control characters, so that it cannot play with a terminal."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def exit_code(error: Error) -> Exit:
    """The exit code that belongs to an error."""
    if isinstance(error, UsageError):
        return Exit.USAGE
    if isinstance(error, LockedError | AttestationError):
        return Exit.DIFFERS  # which is also NOT_VERIFIED
    return Exit.MISSING if isinstance(error, MissingError) else Exit.FAILED


def leave(code: int) -> None:
    """Exit, whatever happens to a stdout that nobody reads any more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
