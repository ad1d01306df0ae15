# SPDX-License-Identifier: Apache-2.0
"""``enclave runtime install | show | remove``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from enclavekit.cli.options import output_options
from enclavekit.cli.output import Exit, Output
from enclavekit.cli.progress import bars
from enclavekit.environment import data_directory
from enclavekit.runtime import Installed, Runtime

NEEDED = ("qemu", "kernel")


def runtime_root() -> Path:
    """The user's."""
    return data_directory() / "runtime"


@click.group()
def runtime() -> None:
    """QEMU and the default guest kernel, from your distribution's packages, without root."""


@runtime.command()
@output_options
def install(output: Output) -> int:
    """Download and unpack them; nothing if they are there already."""
    with bars(output) as tell:
        Runtime(runtime_root()).install(tell)
    return _show(output)


@runtime.command()
@output_options
def show(output: Output) -> int:
    """What is installed, and where; exit 4 when something is lacking."""
    return _show(output)


@runtime.command()
@output_options
def remove(output: Output) -> None:
    """Take it away again."""
    Runtime(runtime_root()).remove()
    output.say("the runtime is removed")


def _show(output: Output) -> int:
    installed = Runtime(runtime_root()).show()
    usable = {item.component.name for item in installed if item.usable}
    if output.json:
        output.result(
            {"schema": 1, "directory": str(runtime_root()), "installed": [_as_dict(item) for item in installed]}
        )
    else:
        for item in installed:
            broken = "" if item.usable else " (damaged: install it again)"
            click.echo(f"{item.component.name:<8} {item.component.version}{broken}")
        if not installed:
            click.echo("nothing is installed: enclave runtime install")
        else:
            click.echo(f"in       {runtime_root()}")
    return Exit.DONE if usable.issuperset(NEEDED) else Exit.MISSING


def _as_dict(item: Installed) -> dict[str, Any]:
    return {
        "name": item.component.name,
        "version": item.component.version,
        "suite": item.component.suite,
        "path": str(item.path),
        "usable": item.usable,
        "packages": [
            {"name": package.name, "version": package.version, "sha256": package.sha256}
            for package in item.component.packages
        ],
    }
