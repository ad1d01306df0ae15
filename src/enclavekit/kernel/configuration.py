# SPDX-License-Identifier: Apache-2.0
"""What a kernel is configured with: fragments, merged, and what came of them.

A fragment is a short file in the kernel's own format. A comment above an option is the reason for it; a later fragment
overrules an earlier one, and says why again. Everything that no fragment sets is off, as in ``make tinyconfig``.
Source: linux Documentation/kbuild/kconfig.rst (KCONFIG_ALLCONFIG), kernel/configs/tiny.config.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from pathlib import Path

from enclavekit.errors import FileError, FormatError, KernelBuildError, UsageError

MAX_SIZE = 1 << 16
MAX_TOLD = 8
"""Options that one error names."""

SET = re.compile(r'(CONFIG_[A-Za-z0-9_]{1,100})=(y|n|m|-?[0-9]{1,20}|0x[0-9a-fA-F]{1,16}|"[^"\\]{0,200}")')
UNSET = re.compile(r"# (CONFIG_[A-Za-z0-9_]{1,100}) is not set")
OFF = "n"


class Target(StrEnum):
    """Architectures, as ``uname -m`` has them."""

    X86_64 = "x86_64"
    AARCH64 = "aarch64"


COMMON = ("base", "enclave", "network", "containers", "hardening")
OF_TARGET = {Target.X86_64: ("x86_64", "hardening-x86_64"), Target.AARCH64: ("aarch64", "hardening-aarch64")}
OPTIONAL = ("netfilter",)
"""Ours, for those who ask for them by name."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option as a fragment has it; ``value`` is ``y``, ``n``, a number, or a string in quotation marks."""

    name: str
    value: str
    reason: str
    fragment: str


def parse(text: str, fragment: str) -> list[Option]:
    """A fragment's options, in order. Errors: FormatError, with the line."""
    options: list[Option] = []
    reason = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        unset = UNSET.fullmatch(line)
        found = SET.fullmatch(line)
        if unset:
            options.append(Option(unset[1], OFF, reason, fragment))
        elif found:
            options.append(Option(found[1], found[2], reason, fragment))
        elif line and not line.startswith("#"):
            raise FormatError(
                f"{fragment}: line {number}: got {line[:64]!r}, expected CONFIG_NAME=VALUE or a comment",
                hint="CONFIG_NAME=y, or # CONFIG_NAME is not set",
            )
        reason = line.lstrip("# ") if line.startswith("#") and not unset else ""
    return options


def fragments(target: Target, more: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Name and text of all fragments for ``target``; ``more`` are files, or names of optional ones of ours.

    Errors: FileError, UsageError.
    """
    own = files("enclavekit.kernel").joinpath("fragments")
    found = [(name, own.joinpath(f"{name}.config").read_text()) for name in (*COMMON, *OF_TARGET[target])]
    for name in more:
        if name in OPTIONAL and not Path(name).exists():
            found.append((name, own.joinpath(f"{name}.config").read_text()))
            continue
        path = Path(name)
        if not path.exists() and "/" not in name:
            raise UsageError(f"fragment {name[:64]!r}: no such file, and none of that name", hint=", ".join(OPTIONAL))
        try:
            with path.open("rb") as file:
                data = file.read(MAX_SIZE + 1)
        except OSError as error:
            raise FileError.of(error, path, "read") from error
        if len(data) > MAX_SIZE:
            raise FormatError(f"{path}: more than {MAX_SIZE} bytes")
        found.append((name, data.decode("utf-8", "replace")))
    return found


def merge(options: Iterable[Option]) -> dict[str, Option]:
    """The last word on each option."""
    return {option.name: option for option in options}


def encode(options: Mapping[str, Option]) -> str:
    """As the kernel's ``make`` reads it; sorted, so that the same options are the same text."""
    return "".join(f"{name}={options[name].value}\n" for name in sorted(options))


def parse_final(text: str) -> dict[str, str]:
    """A kernel's ``.config``: what is set."""
    return {match[1]: match[2] for line in text.splitlines() if (match := re.fullmatch(r"(CONFIG_\w+)=(.*)", line))}


def check(options: Mapping[str, Option], final: Mapping[str, str]) -> None:
    """KernelBuildError when the kernel's own rules made something else of what was asked for."""
    wrong = [option for option in options.values() if final.get(option.name, OFF) != option.value]
    if not wrong:
        return
    told = [
        f"{one.name} is {final.get(one.name, 'not set')}, expected {one.value} ({one.fragment})"
        for one in wrong[:MAX_TOLD]
    ]
    more = f", and {len(wrong) - MAX_TOLD} more" if len(wrong) > MAX_TOLD else ""
    raise KernelBuildError(
        f"configuration: {'; '.join(told)}{more}",
        hint="this version has no such option, or it depends on another one that no fragment sets",
    )
