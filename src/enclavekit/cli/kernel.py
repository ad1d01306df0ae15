# SPDX-License-Identifier: Apache-2.0
"""``enclave kernel``: the guest kernels that ``--kernel NAME`` and lock files know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output
from enclavekit.cli.runtime import runtime_root
from enclavekit.environment import data_directory
from enclavekit.runtime.kernels import Kernels, KnownKernel


def kernels() -> Kernels:
    """The user's."""
    return Kernels(data_directory() / "kernels", runtime_root())


@click.group()
def kernel() -> None:
    """Guest kernels: the runtime's, and those that you have imported."""


@kernel.command("list")
@output_options
def list_kernels(output: Output) -> None:
    """All that are known."""
    found = kernels().all()

    def render(console: Any) -> None:
        for one in found:
            console.print(f"{one.name}  {one.origin}  {one.digest[:23]}…", markup=False)
        if not found:
            console.print("none: enclave runtime install, or enclave kernel import FILE", markup=False)

    output.show({"schema": 1, "kernels": [_as_dict(one) for one in found]}, render)


@kernel.command("import")
@click.argument("file", metavar="FILE")
@click.option("--name", metavar="NAME", help="What it is called here; its version.")
@click.option("--modules", metavar="DIR", help="Its lib/modules/VERSION.")
@click.option("--config", metavar="FILE", help="Its configuration; the one beside it.")
@output_options
def import_kernel(file: str, name: str | None, modules: str | None, config: str | None, output: Output) -> None:
    """Copy a bzImage (x86_64) or Image (aarch64) to where builds find it by its name, or by its digest in a lock."""
    path = Path(file)
    beside = [path.with_name(path.name.replace("vmlinuz-", "config-", 1)), path.with_name(f"{path.name}.config")]
    found = [one for one in beside if one != path and one.is_file()]
    configuration = Path(config) if config else found[0] if found else None
    added = kernels().add(path, name=name, modules=Path(modules) if modules else None, config=configuration)
    output.show(
        {"schema": 1, "kernel": _as_dict(added)},
        lambda console: console.print(f"{added.name}  {added.digest}", markup=False),
    )


def _as_dict(one: KnownKernel) -> dict[str, str]:
    return {
        "name": one.name,
        "version": one.version,
        "origin": one.origin,
        "path": str(one.path),
        "digest": one.digest,
    }
