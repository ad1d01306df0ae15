# SPDX-License-Identifier: Apache-2.0
"""``enclave diff``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from enclavekit import eif
from enclavekit.cli.describe import naming, reading
from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output, printable
from enclavekit.inspection.diff import Comparison, Opened, compare

if TYPE_CHECKING:
    from rich.console import Console

SAME, DIFFERENT = 0, 1
MAX_FILES = 50


@click.command()
@click.argument("one", metavar="A.eif")
@click.argument("other", metavar="B.eif")
@click.option("--pcrs/--no-pcrs", default=True, help="Compute the PCRs as well; without them it is faster.")
@output_options
def diff(one: str, other: str, pcrs: bool, output: Output) -> int:
    """What differs between two images, and which PCRs it moves; -v shows all files.

    Exits with 0 when they are the same byte for byte, 1 when they differ, 2 in trouble.
    """
    with reading(one) as first, reading(other) as second:
        with naming(one):
            ours = Opened(first, eif.inspect(first), one)
        with naming(other):
            theirs = Opened(second, eif.inspect(second), other)
        comparison = compare(ours, theirs, pcrs=pcrs)
    limit = None if output.verbose else MAX_FILES
    output.show(_object(comparison), lambda console: _print(console, comparison, limit))
    return SAME if comparison.same else DIFFERENT


def _object(comparison: Comparison) -> dict[str, Any]:
    pcrs: dict[str, Any] = {name: {"Moved": moved} for name, moved in comparison.moved.items()}
    for index, measured in enumerate(comparison.measured or ()):
        for name, value in eif.measurements_object(measured.measurements).items():
            if name in pcrs:
                pcrs[name]["AB"[index]] = value
    return {
        "schema": 1,
        "Same": comparison.same,
        "PCRs": pcrs,
        "Differences": [
            {
                "Where": difference.where,
                "PCRs": list(difference.pcrs),
                "Details": difference.details,
                "Files": [
                    {"Path": file.path, "Changes": list(file.changes), "Details": list(file.details)}
                    for file in difference.files
                ],
            }
            for difference in comparison.differences
        ],
    }


def _print(console: Console, comparison: Comparison, limit: int | None) -> None:
    from rich.text import Text

    if comparison.same:
        console.print("the same, byte for byte")
        return
    for difference in comparison.differences:
        moves = ", ".join(difference.pcrs) or "no PCR"
        console.print(Text(difference.where, style="bold").append(f"  moves {moves}", style="not bold dim"))
        for detail in difference.details:
            console.print(Text(f"  {printable(detail)}"))
        for file in difference.files[:limit]:
            colour = {"added": "green", "removed": "red"}.get(file.changes[0], "yellow")
            console.print(Text("  ").append(printable(file.path), style=colour).append(f"  {', '.join(file.changes)}"))
            for detail in file.details:
                console.print(Text(f"    {printable(detail)}", style="dim"))
        if limit is not None and len(difference.files) > limit:
            console.print(f"  and {len(difference.files) - limit} other files (-v shows all)")
    moved = [name for name, moved in comparison.moved.items() if moved]
    if moved:
        kept = [name for name, moved in comparison.moved.items() if not moved]
        console.print(f"moved: {', '.join(moved)}" + (f"; the same: {', '.join(kept)}" if kept else ""))
    else:
        console.print("no PCR moves: the two images measure the same")
