# SPDX-License-Identifier: Apache-2.0
"""``enclave doctor``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from enclavekit.cli.options import output_options
from enclavekit.cli.output import Exit, Output, printable
from enclavekit.cli.runtime import runtime_root
from enclavekit.enclave.doctor import Diagnosis, Machine, diagnose
from enclavekit.enclave.findings import Finding, State
from enclavekit.environment import (
    cache_directory,
    data_directory,
    qemu_environment,
    runtime_directory,
    search_path,
)
from enclavekit.hypervisor.carriers import CarrierName, CarrierOptions

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
STYLES = {State.OK: "green", State.WARNING: "yellow", State.MISSING: "bold red"}


@click.command()
@click.option(
    "--carrier", type=click.Choice(["auto", *(name.value for name in CarrierName)]), default="auto", show_default=True,
    help="Which has to work; auto is any.",
)  # fmt: skip
@click.option("--qemu", envvar="ENCLAVEKIT_QEMU", metavar="PROGRAM", help="Instead of the runtime's.")
@output_options
def doctor(carrier: str, qemu: str | None, output: Output) -> int:
    """What this machine can do, and why not; exit 4 when the carrier asked for cannot work."""
    machine = Machine(
        carriers=CarrierOptions(
            runtime_root=runtime_root(), search_path=search_path(), environment=qemu_environment(), qemu=qemu
        ),
        runtime_directory=runtime_directory(),
        data_directory=data_directory(),
        cache_directory=cache_directory(),
    )
    found = diagnose(machine)
    good = found.chosen is not None if carrier == "auto" else found.works[CarrierName(carrier)]
    output.show(_object(found), lambda console: _print(console, found, carrier, quiet=output.quiet))
    return Exit.DONE if good else Exit.MISSING


def _object(found: Diagnosis) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "carriers": {name.value: works for name, works in found.works.items()},
        "chosen": found.chosen.value if found.chosen else None,
        "findings": [asdict(finding) for finding in found.findings],
    }


def _print(console: Console, found: Diagnosis, carrier: str, *, quiet: bool) -> None:
    from rich.text import Text

    def show(finding: Finding) -> None:
        line = Text(f"  {finding.state.value:8}", STYLES[finding.state])
        line.append(f"{finding.name}: {printable(finding.message)}", "")
        console.print(line)
        if finding.remedy:
            console.print(Text(f"  {'':8}remedy: {printable(finding.remedy)}", "dim"))

    areas = dict.fromkeys(finding.area for finding in found.findings)
    for area in areas:
        if carrier != "auto" and area in list(CarrierName) and area != carrier:
            continue
        words = ""
        if area in list(CarrierName):
            works = found.works[CarrierName(area)]
            words = ("works, and is chosen" if found.chosen == area else "works") if works else "does not work"
        console.print(Text(area, "bold").append(f"  {words}" if words else "", ""))
        for finding in found.findings:
            if finding.area == area and not (quiet and finding.state is State.OK):
                show(finding)
