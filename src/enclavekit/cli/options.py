# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from enclavekit.cli.output import Output
from enclavekit.linux.cpu_topology import parse_cpu_list as linux_cpu_list

Command = Callable[..., Any]

MIB = 1 << 20
SIZE = re.compile(r"([0-9]{1,12})\s*([KMG]?)(?:i?B)?", re.IGNORECASE)
UNITS = {"": MIB, "K": 1 << 10, "M": MIB, "G": 1 << 30}


def output_options(command: Command) -> Command:
    """``--json``, ``-q``, ``-v``; the command gets an ``Output``."""

    @click.option("--json", "as_json", is_flag=True, help="Print results and errors as JSON.")
    @click.option("-q", "--quiet", is_flag=True, help="Say nothing but results and errors.")
    @click.option("-v", "--verbose", count=True, help="Say more.")
    @wraps(command)
    def wrapped(*args: Any, as_json: bool, quiet: bool, verbose: int, **kwargs: Any) -> Any:
        return command(*args, output=Output(as_json, quiet, verbose), **kwargs)

    return wrapped


def kernel_options(command: Command) -> Command:
    """Which kernel goes into the image."""
    command = click.option(
        "--modules",
        envvar="ENCLAVEKIT_MODULES",
        metavar="DIR",
        help="That kernel's modules (lib/modules/VERSION). Without it, a --kernel has all built in.",
    )(command)
    return click.option(
        "--kernel", envvar="ENCLAVEKIT_KERNEL", metavar="PATH|NAME", help="bzImage to boot, instead of the runtime's."
    )(command)


def image_options(command: Command) -> Command:
    """What the application in the image runs with; the measured configuration."""
    for option in reversed(
        [
            click.option("--env", "-e", "env", multiple=True, metavar="NAME=VALUE", help="Environment; repeatable."),
            click.option(
                "--entrypoint", metavar="WORDS", help="Instead of the container image's entrypoint and command."
            ),
            click.option("--workdir", metavar="DIR", help="Working directory; the container image's, or /."),
            click.option("--user", metavar="USER[:GROUP]", help="Name or number; the container image's, or root."),
            click.option("--stop-signal", metavar="NAME", help="What asks the application to end; SIGTERM by default."),
            click.option("--logs/--no-logs", help="The image gives the application's output to the host."),
            click.option("--attest/--no-attest", help="`enclave attest` may ask for attestation documents."),
            click.option(
                "--launch-value",
                "launch_value",
                multiple=True,
                metavar="NAME",
                help="`run --set` may give it at each launch; repeatable.",
            ),
            click.option("--cmdline", metavar="TEXT", help="Kernel command line, instead of the default."),
            click.option("--keep-owners/--no-keep-owners", help="dir: keep owners instead of 0:0."),
        ]
    ):
        command = option(command)
    return command


def parse_cpu_list(text: str) -> frozenset[int]:
    """``0,2-3``, as the kernel writes lists of CPUs."""
    try:
        found = linux_cpu_list(text)
    except ValueError as error:
        raise click.BadParameter(f"got {error}") from error
    if not found:
        raise click.BadParameter("got none, expected a list of CPUs like 0,2-3")
    return found


def parse_size(text: str) -> int:
    """``512M``, ``2G``, ``300`` (MiB) as bytes."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise click.BadParameter(f"got {text!r}, expected a size like 512M or 2G")
    return int(match[1]) * UNITS[match[2].upper()]
