# SPDX-License-Identifier: Apache-2.0
"""``manifest.json``: what is installed below the runtime's root, from which packages.

The file is replaced in one rename after everything that it names is in place, so what it says is there, is there.

    {"schema": 1, "components": {NAME: {"version", "directory", "suite", "installed",
                                        "packages": [{"name", "version", "size", "sha256"}]}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from enclavekit.errors import FileError, FormatError

FILE = "manifest.json"
SCHEMA = 1
HINT = "enclave runtime remove, then enclave runtime install"


@dataclass(frozen=True, slots=True)
class Package:
    """A package as the signed lists name it."""

    name: str
    version: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Component:
    """One thing that is installed: ``qemu``, ``kernel``, or a package by its name."""

    name: str
    version: str
    directory: str
    """Below the root."""

    suite: str
    installed: str
    """When: ISO 8601, UTC."""

    packages: tuple[Package, ...]


def read_manifest(root: Path) -> dict[str, Component]:
    """Components by name; none where nothing is installed. Errors: ``FormatError``, ``FileError``."""
    path = root / FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    try:
        value = json.loads(content)
        schema = value["schema"]
        if schema != SCHEMA:
            raise FormatError(f"{path}: schema {schema!r}, expected {SCHEMA}", hint=HINT)
        return {name: _component(name, fields) for name, fields in value["components"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: damaged", hint=HINT) from error


def write_manifest(root: Path, components: Mapping[str, Component]) -> None:
    """Replace the file at once. Errors: OSError."""
    described = {}
    for name, component in sorted(components.items()):
        fields = asdict(component)
        del fields["name"]
        described[name] = fields
    staged = root / f"{FILE}.new"
    staged.write_text(json.dumps({"schema": SCHEMA, "components": described}, indent=2) + "\n")
    staged.replace(root / FILE)


def _component(name: str, fields: Mapping[str, Any]) -> Component:
    directory = str(fields["directory"])
    if "/" in directory or directory in ("", ".", ".."):
        raise ValueError(directory)
    packages = tuple(
        Package(str(package["name"]), str(package["version"]), int(package["size"]), str(package["sha256"]))
        for package in fields["packages"]
    )
    return Component(name, str(fields["version"]), directory, str(fields["suite"]), str(fields["installed"]), packages)
