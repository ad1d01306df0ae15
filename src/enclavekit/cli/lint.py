# SPDX-License-Identifier: Apache-2.0
"""``enclave lint``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from enclavekit.cli.describe import naming, reading
from enclavekit.cli.options import output_options, parse_size
from enclavekit.cli.output import Exit, Output, printable
from enclavekit.inspection.findings import Finding, Level
from enclavekit.inspection.lint import lint as lint_image
from enclavekit.inspection.subject import CARRIERS

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
STYLES = {Level.ERROR: "bold red", Level.WARNING: "yellow", Level.NOTE: "dim"}


@click.command()
@click.argument("image", metavar="F.eif")
@click.option("--memory", "-m", metavar="SIZE", help="What the enclave will get, for instance 512M.")
@click.option("--carrier", type=click.Choice(CARRIERS), help="Where it will run; anywhere by default.")
@click.option("--strict", is_flag=True, help="Warnings count as errors do.")
@output_options
def lint(image: str, memory: str | None, carrier: str | None, strict: bool, output: Output) -> int:
    """Find what will not boot, or will surprise; exit 3 when something will not boot.

    docs/lint.md explains every code.
    """
    size = None if memory is None else parse_size(memory)
    with naming(image), reading(image) as file:
        findings = lint_image(file, name=image, now=datetime.now(UTC), memory=size, carrier=carrier)
    result = {
        "schema": SCHEMA,
        "Findings": [finding_object(finding) for finding in findings],
    }
    output.show(result, lambda console: _print(console, findings, quiet=output.quiet))
    fatal = {Level.ERROR, Level.WARNING} if strict else {Level.ERROR}
    return Exit.DIFFERS if any(finding.level in fatal for finding in findings) else Exit.DONE


def finding_object(finding: Finding) -> dict[str, str | None]:
    """For JSON."""
    return {
        "code": finding.code,
        "level": finding.level.value,
        "where": finding.where,
        "message": finding.message,
        "hint": finding.hint,
    }


def _print(console: Console, findings: Sequence[Finding], *, quiet: bool) -> None:
    from rich.text import Text

    for finding in findings:
        line = Text(f"{finding.level.value:8}", STYLES[finding.level])
        line.append(f"{finding.code}  ", "bold")
        line.append(f"{printable(finding.where)}: {printable(finding.message)}", "")
        console.print(line)
        if finding.hint and not quiet:
            console.print(Text(f"{'':8}hint: {printable(finding.hint)}", "dim"))
    if not quiet:
        counts = Counter(finding.level for finding in findings)
        words = (f"{counts[level]} {level.value}{'s' * (counts[level] != 1)}" for level in Level)
        console.print(", ".join(words) if findings else "nothing found")
