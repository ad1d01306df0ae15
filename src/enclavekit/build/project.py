# SPDX-License-Identifier: Apache-2.0
"""``enclave.toml``: what ``enclave build`` and ``enclave run`` are told, in a file.

Every key is also one of their options. Unknown keys are refused, with the nearest that there is. Paths are relative to
the file's own directory. The table KEYS is all that there is: the reader, the commented file that ``enclave init``
writes and docs/project.md go by it.
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

from enclavekit.build.source import KINDS, is_source
from enclavekit.errors import FileError, ProjectError

FILE = "enclave.toml"
LOCK = "enclave.lock"
MAX_SIZE = 1 << 20


class Kind(Enum):
    """What a value is, in words, and the type that TOML has for it."""

    TEXT = ("a string", str)
    PATH = ("a path", str)
    SOURCE = ("a source", str)
    KEY = ("a path, or a key's name", str)
    WORDS = ("a list of strings", list)
    TABLE = ("a table of strings", dict)
    SWITCH = ("true or false", bool)
    NUMBER = ("a number", int)


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a table. ``option`` is the same on the command line, ``parameter`` its name there."""

    table: str
    name: str
    kind: Kind
    option: str
    parameter: str
    what: str
    example: str

    @property
    def path(self) -> str:
        """``table.name``."""
        return f"{self.table}.{self.name}"


KEYS = (
    Key("image", "source", Kind.SOURCE, "SOURCE", "source", "What the image is made of.", '"oci:./layout:latest"'),
    Key("image", "output", Kind.PATH, "--output", "target", "Where the image goes.", '"app.eif"'),
    Key("image", "name", Kind.TEXT, "--name", "name", "The image's name; its program's.", '"app"'),
    Key("image", "version", Kind.TEXT, "--version", "version", "The image's version.", '"1.0"'),
    Key("image", "arch", Kind.TEXT, "--arch", "arch", "Refuse a kernel for another architecture.", '"x86_64"'),
    Key("image", "keep-owners", Kind.SWITCH, "--keep-owners", "keep_owners", "Of a dir: source.", "false"),
    Key("image", "compat", Kind.TEXT, "--compat", "compat", "Measure the same as nitro-cli would.", '"nitro-cli"'),
    Key("image", "blobs", Kind.PATH, "--blobs", "blobs", "nitro-cli's, for compat.", '"./blobs"'),
    Key("kernel", "path", Kind.PATH, "--kernel", "kernel", "A kernel's file or name; the runtime's.", '"./bzImage"'),
    Key("kernel", "modules", Kind.PATH, "--modules", "modules", "That kernel's lib/modules/VERSION.", '"./modules"'),
    Key("kernel", "cmdline", Kind.TEXT, "--cmdline", "cmdline", "Instead of the default.", '"reboot=k panic=1"'),
    Key(
        "command", "entrypoint", Kind.WORDS, "--entrypoint", "entrypoint",
        "Instead of the container image's entrypoint and command.", '["/bin/app"]',
    ),
    Key(
        "command", "arguments", Kind.WORDS, "-- COMMAND...", "command",
        "Instead of the container image's command.", '["--port", "80"]',
    ),
    Key("command", "env", Kind.TABLE, "--env", "env", "Added to the container image's.", '{ NAME = "value" }'),
    Key("command", "workdir", Kind.TEXT, "--workdir", "workdir", "Working directory.", '"/srv"'),
    Key("command", "user", Kind.TEXT, "--user", "user", "Name or number, of a group too.", '"app:app"'),
    Key("command", "stop-signal", Kind.TEXT, "--stop-signal", "stop_signal", "What asks it to end.", '"SIGINT"'),
    Key("command", "logs", Kind.SWITCH, "--logs", "logs", "Gives its output to the host.", "true"),
    Key("command", "attest", Kind.SWITCH, "--attest", "attest", "The host may ask it for documents.", "true"),
    Key(
        "command", "launch-values", Kind.WORDS, "--launch-value", "launch_value",
        "Names of values that `enclave run --set` may give.", '["GREETING"]',
    ),
    Key("resources", "memory", Kind.TEXT, "--memory", "memory", "Of `enclave run`.", '"512M"'),
    Key("resources", "cpus", Kind.NUMBER, "--cpus", "cpus", "Of `enclave run`.", "2"),
    Key("signing", "certificate", Kind.PATH, "--sign-cert", "sign_cert", "PEM.", '"release.pem"'),
    Key("signing", "key", Kind.KEY, "--sign-key", "sign_key", "PEM, KMS ARN or pkcs11: URI.", '"a.key"'),
    Key("signing", "pkcs11-module", Kind.PATH, "--pkcs11-module", "pkcs11_module", "The token's library.", '"/x.so"'),
)  # fmt: skip

_TABLES = {
    "image": "What is made.",
    "kernel": "What it boots. Without this, the kernel of `enclave runtime install`.",
    "command": "What runs in it, where that is not as the container image has it.",
    "resources": "What it runs with.",
    "signing": "Who signs it. Without this, nobody.",
}


@dataclass(frozen=True, slots=True)
class Project:
    """A file that was read; ``values`` are the options, by the names that they have on the command line."""

    path: Path
    values: Mapping[str, Any]

    @property
    def lock(self) -> Path:
        """The lock file's place."""
        return self.path.with_name(LOCK)


def read_project(path: Path) -> Project:
    """Errors: FileError, ProjectError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise FileError.of(error, path, "read", hint="enclave init makes one") from error
    if len(data) > MAX_SIZE:
        raise ProjectError(f"{path}: more than {MAX_SIZE} bytes")
    try:
        tables = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # tomllib's own, and of the decoding
        text = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "not text in UTF-8, or nested too deeply"
        raise ProjectError(f"{path}: {text[:1].lower()}{text[1:]}") from error
    known = {key.path: key for key in KEYS}
    values: dict[str, Any] = {}
    for table, entries in tables.items():
        if table not in _TABLES:
            raise _unknown(path, table, list(_TABLES))
        if not isinstance(entries, dict):
            raise ProjectError(f"{path}: {table}: expected a table", hint=f"[{table}]")
        for name, value in entries.items():
            key = known.get(f"{table}.{name}")
            if key is None:
                raise _unknown(path, f"{table}.{name}", list(known))
            values[key.parameter] = _value(path, key, value)
    return Project(path, values)


def template(source: str | None = None) -> str:
    """A file with every key, commented; the source and the output are set."""
    lines = [
        "# What `enclave build` and `enclave run` do in this directory. Each key is also an option, which counts more.",
        "# Paths are relative to this file.",
    ]
    for table, what in _TABLES.items():
        lines += ["", f"# {what}", f"[{table}]"]
        for key in KEYS:
            if key.table != table:
                continue
            value, mark = key.example, "# "
            if key.parameter == "source":
                value, mark = (_quoted(source), "") if source else (key.example, "# ")
            elif key.parameter == "target":
                mark = ""
            lines.append(f"{f'{mark}{key.name} = {value}':<40}  # {key.what}")
    return "\n".join(lines) + "\n"


def _value(path: Path, key: Key, value: Any) -> Any:  # noqa: ANN401 - what TOML has, and the option takes
    words, kind = key.kind.value
    strings = {list: value, dict: value.values() if isinstance(value, dict) else ()}.get(kind, ())
    if key.parameter == "entrypoint" and isinstance(value, str):
        return value  # as on the command line
    if type(value) is not kind or not all(isinstance(one, str) for one in strings):
        raise ProjectError(
            f"{path}: {key.path}: got {_shown(value)}, expected {words}", hint=f"{key.name} = {key.example}"
        )
    match key.kind:
        case Kind.TABLE:
            return [f"{name}={one}" for name, one in value.items()]
        case Kind.WORDS:
            return shlex.join(value) if key.parameter == "entrypoint" else value
        case Kind.SOURCE:
            return _source(path, value)
        case Kind.PATH | Kind.KEY:
            return value if _is_name(path, key, value) else str(path.parent / value)
    return value


def _is_name(path: Path, key: Key, value: str) -> bool:
    """Whether it is no path: a key that is elsewhere, or a kernel that is known by its name."""
    if key.kind is Kind.KEY:
        return value.startswith(("arn:", "pkcs11:"))
    return key.parameter == "kernel" and "/" not in value and not path.with_name(value).exists()


def _source(path: Path, value: str) -> str:
    if not is_source(value):
        raise ProjectError(
            f"{path}: image.source: {value!r}, expected one of {', '.join(f'{kind}:' for kind in KINDS)}"
        )
    kind, _, rest = value.partition(":")
    elsewhere = rest.startswith("/") or kind in ("docker", "docker-daemon")
    return value if elsewhere else f"{kind}:{path.parent / rest}"


def _unknown(path: Path, name: str, known: list[str]) -> ProjectError:
    near = get_close_matches(name, known, 1, 0.5)
    return ProjectError(
        f"{path}: {name[:64]}: unknown key", hint=f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    )


def _shown(value: Any) -> str:  # noqa: ANN401 - what TOML has
    text = repr(value)
    return text if len(text) <= 64 else f"{text[:64]}…"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
