# SPDX-License-Identifier: Apache-2.0
"""``enclave run --dry-run``: what a launch would be, and all that it would fail with."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, BinaryIO

from enclavekit.cli.lint import finding_object
from enclavekit.cli.output import Exit, Output, printable
from enclavekit.enclave.preflight import Preflight, preflight
from enclavekit.enclave.run import RunOptions
from enclavekit.hypervisor.carriers import CarrierName, CarrierOptions
from enclavekit.inspection.findings import Finding, Level
from enclavekit.inspection.lint import lint
from enclavekit.platform.guest_map import guest_map

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1


def dry_run(
    file: BinaryIO,
    wanted: CarrierName | None,
    carriers: CarrierOptions,
    options: RunOptions,
    output: Output,
) -> int:
    """Print it, and give the exit code: that of a run which fails, if it would."""
    now = datetime.now(UTC)
    found = preflight(file, wanted, carriers, options, now)
    carrier = found.selected.name if found.selected else wanted
    findings = _lint(file, found, now, options.image, carrier)
    good = found.good and not any(finding.level is Level.ERROR for finding in findings)
    output.show(_object(found, findings, options, good=good), lambda console: _print(console, found, findings))
    return Exit.DONE if good else Exit.RUN_FAILED


def _lint(
    file: BinaryIO, found: Preflight, now: datetime, name: str, carrier: CarrierName | None
) -> tuple[Finding, ...]:
    """What lint says to an image that can be read, but for what the checks have said already."""
    if found.planned is None:
        return ()
    findings = lint(file, name=name, now=now, memory=found.planned.memory, carrier=carrier.value if carrier else None)
    return tuple(finding for finding in findings if finding.level is not Level.NOTE)


def _object(found: Preflight, findings: tuple[Finding, ...], options: RunOptions, *, good: bool) -> dict[str, Any]:
    selected = found.selected
    return {
        "schema": SCHEMA,
        "ok": good,
        "carrier": selected.name.value if selected else None,
        "accel": selected.accel.value if selected and selected.accel else None,
        "memory": found.planned.memory if found.planned else None,
        "boot": options.boot.value,
        "memory_map": [
            {"name": one.name, "start": one.start, "end": one.end}
            for one in guest_map(options.boot, found.planned.kernel, found.planned.image, found.planned.memory)
        ]
        if found.planned
        else None,
        "cpus": options.cpus,
        "mode": options.mode.name.lower(),
        "cid": found.cid,
        "name": options.name,
        "measurements": found.measurements,
        "checks": [
            {
                "name": check.name,
                "ok": check.error is None,
                "message": check.error.message if check.error else check.detail,
                "code": check.error.code if check.error else None,
                "hint": check.error.hint if check.error else None,
            }
            for check in found.checks
        ],
        "lint": [finding_object(finding) for finding in findings],
    }


def _print(console: Console, found: Preflight, findings: tuple[Finding, ...]) -> None:
    from rich.text import Text

    def line(style: str, mark: str, name: str, message: str, hint: str | None) -> None:
        console.print(Text(f"{mark:8}", style).append(f"{name}  ", "bold").append(printable(message), ""))
        if hint:
            console.print(Text(f"{'':8}hint: {printable(hint)}", "dim"))

    for check in found.checks:
        if check.error is None:
            line("green", "ok", check.name, check.detail, None)
        else:
            line("bold red", "error", check.name, check.error.message, check.error.hint)
    for finding in findings:
        style = "bold red" if finding.level is Level.ERROR else "yellow"
        line(style, finding.level.value, finding.code, f"{finding.where}: {finding.message}", finding.hint)
