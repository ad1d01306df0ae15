# SPDX-License-Identifier: Apache-2.0
"""``enclave cache``: what can be fetched or made again."""

from __future__ import annotations

import click

from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output
from enclavekit.environment import cache_directory
from enclavekit.image.layer_cache import LayerCache

DAY_S = 24 * 3600


@click.group()
def cache() -> None:
    """Layers of container images, fetched and unpacked once for all builds."""


@cache.command()
@click.option("--days", type=click.IntRange(min=0), default=30, show_default=True, help="Keep what was used since.")
@output_options
def prune(days: int, output: Output) -> None:
    """Take away layers that were not used for some time; they come again when they are needed."""
    count, size = LayerCache(cache_directory() / "layers").prune(days * DAY_S)
    output.show(
        {"schema": 1, "Layers": count, "Bytes": size}, lambda console: console.print(f"{count} layers, {size} bytes")
    )
