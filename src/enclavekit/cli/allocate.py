# SPDX-License-Identifier: Apache-2.0
"""``enclave allocate``."""

from __future__ import annotations

import click

from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output
from enclavekit.enclave.allocator import MAX_CONFIG, MIB, allocate, parse_config
from enclavekit.errors import FileError
from enclavekit.linux.cpu_topology import format_cpu_list

SCHEMA = 1
CONFIG = "/etc/nitro_enclaves/allocator.yaml"


@click.command("allocate")
@click.option("--config", metavar="FILE", default=CONFIG, show_default=True, help="What to set aside.")
@click.option("--check", is_flag=True, help="Only read the file; no root is needed.")
@output_options
def allocate_command(config: str, check: bool, output: Output) -> None:
    """Set CPUs and memory aside for enclaves of the nitro carrier, in place of those that were. Needs root.

    What fails is rolled back.
    """
    try:
        with open(config, "rb") as file:  # noqa: PTH123 - an argument
            data = file.read(MAX_CONFIG + 1)
    except OSError as error:
        raise FileError.of(error, config, "read") from error
    wanted = parse_config(data, config)
    if check:
        cpus = f"{wanted.cpu_count}" if wanted.cpu_pool is None else format_cpu_list(wanted.cpu_pool)
        output.show(
            {
                "schema": SCHEMA,
                "memory_mib": wanted.memory_mib,
                "cpu_count": wanted.cpu_count,
                "cpu_pool": None if wanted.cpu_pool is None else sorted(wanted.cpu_pool),
            },
            lambda console: console.print(f"{config}: {wanted.memory_mib} MiB, CPUs: {cpus}", markup=False),
        )
        return
    made = allocate(wanted)
    pages = [{"size_mib": size // MIB, "count": count} for size, count in made.pages.items()]
    output.show(
        {
            "schema": SCHEMA,
            "node": made.node,
            "cpus": sorted(made.cpus),
            "memory_mib": made.memory // MIB,
            "pages": pages,
        },
        lambda console: console.print(
            f"NUMA node {made.node}: CPUs {format_cpu_list(made.cpus)}, {made.memory // MIB} MiB in "
            + ", ".join(f"{page['count']} pages of {page['size_mib']} MiB" for page in pages),
            markup=False,
        ),
    )
