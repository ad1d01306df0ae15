# SPDX-License-Identifier: Apache-2.0
"""``enclave cache``: what can be fetched or made again."""

from __future__ import annotations

import click

from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output
from enclavekit.environment import cache_directory, lab_cache
from enclavekit.image.layer_cache import LayerCache
from enclavekit.lab.root import prune as prune_systems

DAY_S = 24 * 3600


@click.group()
def cache() -> None:
    """Layers of container images, and root file systems of labs' parents: made once, and used again."""


@cache.command()
@click.option("--days", type=click.IntRange(min=0), default=30, show_default=True, help="Keep what was used since.")
@output_options
def prune(days: int, output: Output) -> None:
    """Take away what was not used for some time; layers come again when they are needed, the rest by `lab install`."""
    count, size = LayerCache(cache_directory() / "layers").prune(days * DAY_S)
    systems, system_size = prune_systems(lab_cache(), days * DAY_S)
    output.show(
        {"schema": 1, "Layers": count, "Bytes": size, "LabSystems": systems, "LabBytes": system_size},
        lambda console: console.print(f"{count} layers, {size} bytes; {systems} systems of labs, {system_size} bytes"),
    )
