# SPDX-License-Identifier: Apache-2.0
"""What ``run-enclave`` is asked for, from its options or from a ``--config`` file in JSON, by nitro-cli's rules.

Source: aws-nitro-enclaves-cli src/common/commands_parser.rs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enclavekit.errors import FileError
from enclavekit.nitro_cli.codes import Code
from enclavekit.nitro_cli.command import NitroCliError
from enclavekit.platform.placement import NITRO_CLI_FACTOR

MAX_CONFIG = 1 << 16
MEMORY = re.compile(r"([0-9]{1,12})([MmGgTt]?)", re.ASCII)
UNITS = {"": 1, "m": 1, "g": 1 << 10, "t": 1 << 20}
RESERVED_CIDS = (1, 2, 3, 0xFFFFFFFF)
U32 = 0xFFFFFFFF
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class RunEnclaveOptions:
    """One enclave to be run; ``cpu_ids`` or ``cpu_count`` is None, ``cid`` None for any."""

    eif_path: str
    memory_mib: int
    cpu_count: int | None = None
    cpu_ids: tuple[int, ...] | None = None
    cid: int | None = None
    name: str | None = None
    debug: bool = False
    attach_console: bool = False


def parse_memory(text: str) -> int:
    """MiB: ``512``, ``512M``, ``2G``, ``1T``. NitroCliError E03."""
    match = MEMORY.fullmatch(text)
    if match is None:
        raise _invalid("memory", text, "a size like 512 or 2G")
    return int(match[1]) * UNITS[match[2].lower()]


def parse_number(argument: str, text: str) -> int:
    """A number of 32 bits. NitroCliError E03."""
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > U32:
        raise _invalid(argument, text, f"a number from 0 to {U32}")
    return int(text)


def parse_cid(text: str) -> int:
    """NitroCliError E03 for those that no enclave can have; 0 is for any."""
    cid = parse_number("enclave-cid", text)
    if cid in RESERVED_CIDS:
        raise _invalid("enclave-cid", text, "a CID other than 1, 2, 3 and 4294967295, which are taken")
    return cid


def read_config(path: str, *, attach_console: bool) -> RunEnclaveOptions:
    """A ``--config`` file. NitroCliError: E19 unreadable, E17 not such JSON, E01 and E02 for the CPUs."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_CONFIG + 1)
    except OSError as error:
        raise NitroCliError(
            Code.FILE_OPERATION, FileError.of(error, path, "read").message, file=path, operation="Open"
        ) from error
    if len(data) > MAX_CONFIG:
        raise NitroCliError(Code.SERDE, f"{path}: more than {MAX_CONFIG} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NitroCliError(Code.SERDE, f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise NitroCliError(Code.SERDE, f"{path}: {type(found).__name__}, expected an object")
    return _from_config(path, found, attach_console=attach_console)


def _from_config(path: str, found: dict[str, Any], *, attach_console: bool) -> RunEnclaveOptions:
    known = {
        "enclave_name": str,
        "eif_path": str,
        "memory_mib": int,
        "cpu_count": int,
        "cpu_ids": list,
        "enclave_cid": int,
        "debug_mode": bool,
        "attach_console": bool,
    }
    for key, value in found.items():
        if key not in known:
            raise NitroCliError(Code.SERDE, f"{path}: unknown key {key[:64]!r}, expected one of {', '.join(known)}")
        if value is not None and (not isinstance(value, known[key]) or (known[key] is int and not _is_number(value))):
            raise NitroCliError(Code.SERDE, f"{path}: {key}: expected {known[key].__name__}")
    for key in ("eif_path", "memory_mib"):
        if found.get(key) is None:
            raise NitroCliError(Code.SERDE, f"{path}: {key} is missing")
    count, ids = found.get("cpu_count"), found.get("cpu_ids")
    if ids is not None and not all(_is_number(number) for number in ids):
        raise NitroCliError(Code.SERDE, f"{path}: cpu_ids: expected a list of numbers")
    if count is not None and ids is not None:
        raise NitroCliError(Code.CONFLICTING_ARGUMENT, f"{path}: cpu_count and cpu_ids, expected one of them")
    if count is None and ids is None:
        raise NitroCliError(Code.MISSING_ARGUMENT, f"{path}: neither cpu_count nor cpu_ids, expected one of them")
    attach = attach_console or bool(found.get("attach_console"))
    return RunEnclaveOptions(
        found["eif_path"],
        found["memory_mib"],
        count,
        None if ids is None else tuple(ids),
        found.get("enclave_cid"),
        found.get("enclave_name"),
        bool(found.get("debug_mode")) or attach,
        attach,
    )


def check_memory_rule(eif_path: str, size: int, memory_mib: int) -> None:
    """NitroCliError E26: four times the image, and not nothing."""
    if memory_mib == 0 or NITRO_CLI_FACTOR * size > memory_mib * MIB:
        needed = NITRO_CLI_FACTOR * -(-size // MIB)
        raise NitroCliError(
            Code.INSUFFICIENT_MEMORY_REQUESTED,
            f"{eif_path}: at least {needed} MB must be asked for (got {memory_mib} MB), four times the image's size",
        )


def default_name(eif_path: str) -> str:
    """The file's name without ``.eif``, also where that stands more than once."""
    name = Path(eif_path).name
    while name.endswith(".eif"):
        name = name.removesuffix(".eif")
    return name


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64


def _invalid(argument: str, text: str, expected: str) -> NitroCliError:
    return NitroCliError(Code.INVALID_ARGUMENT, f"{argument}: got {text[:64]!r}, expected {expected}")
