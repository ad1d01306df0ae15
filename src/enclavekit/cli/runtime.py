# SPDX-License-Identifier: Apache-2.0
"""``enclave runtime install | show | remove``."""

from __future__ import annotations

import os

import click

from enclavekit.cli.environment import data_directory
from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output
from enclavekit.cli.progress import steps
from enclavekit.runtime import Runtime


def installed_runtime() -> Runtime:
    """The user's."""
    return Runtime(data_directory() / "runtime")


@click.group()
def runtime() -> None:
    """QEMU and the default guest kernel, from your distribution's packages, without root."""


@runtime.command()
@output_options
def install(output: Output) -> None:
    """Download and unpack them; nothing if they are there already."""
    where = installed_runtime()
    with steps(output) as progress:
        where.install(dict(os.environ), progress)
    _show(where, output)


@runtime.command()
@output_options
def show(output: Output) -> int:
    """What is installed, and where."""
    return _show(installed_runtime(), output)


@runtime.command()
@output_options
def remove(output: Output) -> None:
    """Take it away again."""
    installed_runtime().remove()
    output.say("the runtime is removed")


def _show(where: Runtime, output: Output) -> int:
    manifest = where.manifest()
    qemu, kernel = where.qemu(), where.kernel()
    found = None
    if manifest is not None and qemu is not None and kernel is not None:
        found = {
            "qemu": {"version": ".".join(map(str, qemu.version)), "command": list(qemu.command)},
            "kernel": {"name": kernel.name, "path": str(kernel.path), "modules": str(kernel.modules)},
            "packages": manifest["qemu"]["packages"] + manifest["kernel"]["packages"],
        }
    if output.json:
        output.result({"schema": 1, "directory": str(where.root), "installed": found})
    elif found is None or qemu is None or kernel is None:
        click.echo(f"nothing is installed in {where.root}; enclave runtime install does it")
    else:
        click.echo(f"QEMU    {'.'.join(map(str, qemu.version))}")
        click.echo(f"kernel  {kernel.name}")
        click.echo(f"in      {where.root}, {len(found['packages'])} packages")
    return 0 if found is not None else 4
