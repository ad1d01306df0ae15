# SPDX-License-Identifier: Apache-2.0
"""``enclave build``."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from enclavekit.build.application import Application
from enclavekit.build.image import BuildOptions, KernelChoice
from enclavekit.build.image import build as build_image
from enclavekit.build.nitro_cli import Blobs
from enclavekit.build.source import Access
from enclavekit.cli.describe import certificate
from enclavekit.cli.environment import cache_directory, docker_config, proxies, search_path, source_date_epoch
from enclavekit.cli.options import image_options, kernel_options, output_options
from enclavekit.cli.output import Output
from enclavekit.cli.progress import layer_bars
from enclavekit.cli.runtime import runtime_root
from enclavekit.cli.sign import make_signature, signing_options
from enclavekit.eif import Arch, measurements_object
from enclavekit.errors import UsageError
from enclavekit.image.container import Report
from enclavekit.image.layer_cache import LayerCache
from enclavekit.image.registry_auth import DockerConfig
from enclavekit.runtime import find_kernel


def build_options(
    source: str,
    output: Path,
    command: tuple[str, ...],
    *,
    kernel: str | None,
    modules: str | None,
    arch: str | None,
    compat: str | None = None,
    blobs: str | None = None,
    report: Report = lambda name, done, size: None,
    **words: Any,
) -> BuildOptions:
    """From the command line's words to what is built."""
    if bool(compat) != bool(blobs):
        raise UsageError("--compat and --blobs need each other", hint="--compat nitro-cli --blobs DIR")
    if blobs:
        chosen = KernelChoice(Path(blobs), None, "")  # the blobs have their own
    else:
        found = find_kernel(runtime_root(), kernel, modules)
        chosen = KernelChoice(found.path, found.modules, found.name)
    return BuildOptions(
        source=source,
        output=output,
        kernel=chosen,
        blobs=Blobs(Path(blobs)) if blobs else None,
        application=Application(
            command=command,
            entrypoint=None if words["entrypoint"] is None else shlex.split(words["entrypoint"]),
            environment=words["env"],
            workdir=words["workdir"],
            user=words["user"],
            stop_signal=words["stop_signal"],
            logs=words["logs"],
            launch=words["launch_value"],
        ),
        access=access(report),
        cmdline=words["cmdline"],
        keep_owners=words["keep_owners"],
        epoch=source_date_epoch(),
        arch=Arch[arch.upper()] if arch else None,
    )


def access(report: Report) -> Access:
    """To container images: this user's cache, docker's configuration, and proxies."""
    return Access(
        LayerCache(cache_directory() / "layers"), report, DockerConfig.read(docker_config(), search_path()), proxies()
    )


@click.command()
@click.argument("source", metavar="SOURCE")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("-o", "--output", "target", required=True, metavar="F.eif", help="Where the image goes.")
@click.option(
    "--arch", type=click.Choice([str(arch) for arch in Arch]), help="Refuse a kernel for another architecture."
)
@click.option("--compat", type=click.Choice(["nitro-cli"]), help="Measure the same as nitro-cli 1.5 would.")
@click.option("--blobs", metavar="DIR", help="nitro-cli's kernel, command line, init and nsm.ko, for --compat.")
@kernel_options
@image_options
@signing_options
@output_options
def build(
    source: str,
    command: tuple[str, ...],
    target: str,
    sign_cert: str | None,
    sign_key: str | None,
    pkcs11_module: str | None,
    output: Output,
    **words: Any,
) -> None:
    """Make an image of a container image or a root filesystem. The same inputs give the same bytes.

    SOURCE is docker://NAME, oci:DIR[:TAG], oci-archive:F[:TAG], docker-archive:F[:NAME:TAG], dir:DIR or tar:F. What
    runs in the enclave is the container image's entrypoint and command; a command after -- takes the latter's place, as
    with docker run.
    """
    if bool(sign_cert) != bool(sign_key):
        raise UsageError("--sign-cert and --sign-key need each other", hint="enclave keygen makes both")
    with layer_bars(output) as report:
        options = build_options(source, Path(target), command, report=report, **words)
        pcr8 = None
        if sign_cert and sign_key:
            pcr8 = certificate(sign_cert).pcr8
            options = replace(options, sign=make_signature(sign_cert, sign_key, pkcs11_module, output))
        result = build_image(options)
    for warning in result.warnings:
        output.say(f"warning: {warning}")
    output.detail(f"{result.path}: {result.size} bytes, {result.arch}")
    output.result({"Measurements": measurements_object(result.measurements, pcr8)})
