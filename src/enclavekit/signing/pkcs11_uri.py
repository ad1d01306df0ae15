# SPDX-License-Identifier: Apache-2.0
"""PKCS#11 URIs (RFC 7512): which key in which token, and what opens it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import unquote_to_bytes

from enclavekit.errors import FileError, SigningError

MAX_SIZE = 4096
MAX_PIN_SIZE = 1024
_PATH = ("token", "manufacturer", "serial", "model", "slot-id", "object", "id", "type")
_QUERY = ("module-path", "pin-value", "pin-source")


@dataclass(frozen=True, slots=True)
class Pkcs11Uri:
    """The attributes that we know: others are an error, for ignoring one could choose another key.

    ``shown`` is the URI without its PIN.
    """

    shown: str
    token: str | None = None
    manufacturer: str | None = None
    serial: str | None = None
    model: str | None = None
    slot: int | None = None
    label: str | None = None
    id: bytes | None = None
    module: str | None = None
    pin: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, uri: str) -> Self:
        """SigningError for anything that is none; FileError when the file of its PIN cannot be read."""
        path, _, query = uri.removeprefix("pkcs11:").partition("?")
        shown = f"pkcs11:{path}"
        if len(uri) > MAX_SIZE:
            raise SigningError(f"pkcs11 URI: {len(uri)} characters, expected at most {MAX_SIZE}")
        parts = _attributes(path, ";", _PATH, shown) | _attributes(query, "&", _QUERY, shown)
        if parts.get("type", b"private") not in (b"private", b"cert", b"public"):
            raise SigningError(f"{shown}: type {_text(parts['type'], shown)!r}, expected private")
        slot = _text(parts["slot-id"], shown) if "slot-id" in parts else None
        if slot is not None and not (slot.isascii() and slot.isdigit()):
            raise SigningError(f"{shown}: slot-id {slot!r}, expected a number")
        if "object" not in parts and "id" not in parts:
            raise SigningError(f"{shown}: names no key", hint="with object=LABEL or id=%01%02, for example")

        def text(name: str) -> str | None:
            return _text(parts[name], shown) if name in parts else None

        return cls(
            shown=shown,
            token=text("token"),
            manufacturer=text("manufacturer"),
            serial=text("serial"),
            model=text("model"),
            slot=None if slot is None else int(slot),
            label=text("object"),
            id=parts.get("id"),
            module=text("module-path"),
            pin=_pin(text("pin-value"), text("pin-source"), shown),
        )


def _attributes(text: str, separator: str, known: tuple[str, ...], shown: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for part in filter(None, text.split(separator)):
        name, equals, value = part.partition("=")
        if name not in known or not equals:
            raise SigningError(f"{shown}: attribute {name[:32]!r}, expected one of {', '.join(known)}")
        if name in found:
            raise SigningError(f"{shown}: {name} is there twice")
        found[name] = unquote_to_bytes(value)
    return found


def _text(value: bytes, shown: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise SigningError(f"{shown}: an attribute that is not UTF-8") from error


def _pin(value: str | None, source: str | None, shown: str) -> str | None:
    if value is not None and source is not None:
        raise SigningError(f"{shown}: pin-value and pin-source, expected one of them")
    if source is None:
        return value
    path = Path(source.removeprefix("file://").removeprefix("file:"))
    try:
        with path.open("rb") as file:
            return file.read(MAX_PIN_SIZE).decode().strip("\r\n")
    except OSError as error:
        raise FileError.of(error, path, "read the PIN from") from error
    except UnicodeDecodeError as error:
        raise SigningError(f"{path}: the PIN is not UTF-8") from error
