# SPDX-License-Identifier: Apache-2.0
"""What every command of nitro-cli's stands on: failures with its codes, files, its JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click

from enclavekit.errors import CertificateError, Error, FileError, FormatError, MissingError, UsageError
from enclavekit.nitro_cli.codes import Code

MAX_CERTIFICATE = 1 << 20
HELP = "https://docs.aws.amazon.com/enclaves/latest/user/cli-errors.html"


class NitroCliError(Exception):
    """What ends a command: nitro-cli's code, and our words; for E19 also the file and what was done with it."""

    def __init__(self, code: Code, message: str, *, file: str | None = None, operation: str = "Open") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.file = file
        self.operation = operation

    def text(self) -> str:
        """As the commands print it."""
        text = f"[ {self.code} ] {sentence(self.code.meaning)} {printable(self.message)}"
        if self.file is not None:
            text += f"\nFile: '{printable(self.file)}', failing operation: '{self.operation}'."
        return f"{text}\n\nFor more details, please visit {HELP}#{self.code}"


@contextmanager
def failing(code: Code) -> Iterator[None]:
    """Errors of ours become nitro-cli's, with this code."""
    try:
        yield
    except Error as error:
        hint = f" ({error.hint})" if error.hint and isinstance(error, MissingError | UsageError) else ""
        raise NitroCliError(code, f"{error.message}{hint}") from error


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise FileError(f"cannot read {path}: not an ordinary file")
        file = Path(path).open("rb")  # noqa: SIM115 - errors of the block are not of opening
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    with file:
        try:
            yield file
        except FormatError as error:
            raise type(error)(f"{path}: {error.message}") from error
        except OSError as error:
            raise FileError.of(error, path, "read") from error


def read_certificate(path: str) -> bytes:
    with opened(path) as file:
        data = file.read(MAX_CERTIFICATE + 1)
        if len(data) > MAX_CERTIFICATE:
            raise CertificateError(f"certificate: larger than {MAX_CERTIFICATE} bytes")
        return data


def pkcs11() -> tuple[str | None, str | None]:
    """Module and PIN, for keys named by a pkcs11: URI."""
    return os.environ.get("NITRO_CLI_PKCS11_MODULE") or None, os.environ.get("NITRO_CLI_PKCS11_PIN") or None


def sentence(text: str) -> str:
    """Half a sentence as a whole one."""
    return f"{text[:1].upper()}{text[1:]}."


def printable(text: str) -> str:
    """Hostile text without control characters."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def json_text(value: Any) -> str:  # noqa: ANN401 - any JSON
    """As serde_json prints: two spaces, no escapes but the needed ones."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def print_json(value: Any) -> None:  # noqa: ANN401 - any JSON
    """On stdout."""
    click.echo(json_text(value).encode("utf-8", "backslashreplace"))
