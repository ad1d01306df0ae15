# SPDX-License-Identifier: Apache-2.0
"""``enclave explain CODE``: every error of ours, lint's rules, and nitro-cli's E00 to E60."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import click

from enclavekit import errors
from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output
from enclavekit.errors import Error, UsageError
from enclavekit.inspection.findings import RULES
from enclavekit.nitro_cli.codes import Code

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Explanation:
    """``origin``: ``error`` of ours, ``lint`` or ``nitro-cli``. ``meaning`` and ``remedy`` are sentences."""

    code: str
    origin: str
    meaning: str
    remedy: str


def explanations() -> Iterator[Explanation]:
    """All that there are. An error of ours has its meaning in its docstring, and what helps beside its code."""
    for kind in _tree(errors.Error):
        yield Explanation(kind.code, "error", _meaning(kind), _sentence(kind.remedy))
    for code, rule in RULES.items():
        yield Explanation(code, "lint", _sentence(rule.text), "docs/lint.md says more of it.")
    for one in Code:
        yield Explanation(str(one), "nitro-cli", _sentence(one.meaning), _sentence(one.remedy))


def _tree(kind: type[Error]) -> Iterator[type[Error]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


def _driver_code(text: str) -> str:
    """Our code for one of the driver's, by its name, NE_ERR_..., or its number from 256 on; else what was given."""
    for kind in _tree(errors.DriverError):
        if issubclass(kind, errors.DriverError) and kind.name and text.upper() in (kind.name, str(kind.number)):
            return kind.code
    return text


def _meaning(kind: type[Error]) -> str:
    """Without what is for readers of the code: the first paragraph, on one line."""
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


@click.command()
@click.argument("code", required=False, metavar="[CODE]")
@output_options
def explain(code: str | None, output: Output) -> None:
    """What an error means, and what helps.

    CODE is what --json prints, or nitro-cli's, as in E26, or the driver's, as in 266.

    Without CODE, all that there are.
    """
    known = list(explanations())
    wanted = None if code is None else _driver_code(code)
    found = known if wanted is None else [one for one in known if one.code.lower() == wanted.lower()]
    if code is not None and not found:
        near = get_close_matches(code.lower(), [one.code for one in known if one.origin != "nitro-cli"], 1)
        raise UsageError(
            f"{code[:64]!r}: no such code", hint=f"did you mean {near[0]}?" if near else "enclave explain shows all"
        )
    output.show(
        {"schema": SCHEMA, "explanations": [asdict(one) for one in found]},
        lambda console: _list(console, found) if code is None else _print(console, found),
    )


def _print(console: Console, found: list[Explanation]) -> None:
    for one in found:
        console.print(f"{one.code} ({one.origin}): {one.meaning}\n{one.remedy}", markup=False)


def _list(console: Console, found: list[Explanation]) -> None:
    for one in found:
        console.print(f"{one.code:20} {one.meaning}", markup=False)
