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
from enclavekit.build.project import LOCK
from enclavekit.build.source import Access
from enclavekit.cli.describe import certificate, read_small
from enclavekit.cli.explain import explain_text, explanation_object
from enclavekit.cli.kernel import kernels
from enclavekit.cli.options import image_options, kernel_options, output_options
from enclavekit.cli.output import Output
from enclavekit.cli.progress import layer_bars
from enclavekit.cli.project import ProjectCommand, config_option, project_of, with_added
from enclavekit.cli.sign import make_signature, signing_options
from enclavekit.eif import Arch, Lock, measurements_object
from enclavekit.eif.lock import KERNEL
from enclavekit.eif.lock import MAX_SIZE as MAX_LOCK_SIZE
from enclavekit.environment import (
    cache_directory,
    docker_config,
    docker_sockets,
    proxies,
    search_path,
    source_date_epoch,
)
from enclavekit.errors import FormatError, UsageError
from enclavekit.image.container import Report
from enclavekit.image.layer_cache import LayerCache
from enclavekit.image.registry_auth import DockerConfig
from enclavekit.linux.atomic import replacing


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
    locked: Lock | None = None,
    report: Report = lambda name, done, size: None,
    **words: Any,
) -> BuildOptions:
    """From the command line's words to what is built."""
    if bool(compat) != bool(blobs):
        raise UsageError("--compat and --blobs need each other", hint="--compat nitro-cli --blobs DIR")
    if blobs:
        chosen = KernelChoice(Path(blobs), None, "")  # the blobs have their own
    else:
        pinned = locked.find(KERNEL) if locked else None
        found = kernels().choose(kernel, modules, pinned.digest if pinned else None)
        chosen = KernelChoice(found.path, found.modules, found.name, kernels().made_of(found.path))
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
            attest=words["attest"],
        ),
        access=access(report),
        cmdline=words["cmdline"],
        keep_owners=words["keep_owners"],
        epoch=source_date_epoch(),
        arch=Arch[arch.upper()] if arch else None,
        name=words.get("name"),
        version=words.get("version"),
        locked=locked,
    )


def access(report: Report) -> Access:
    """To container images: this user's cache, docker's configuration, and proxies."""
    return Access(
        LayerCache(cache_directory() / "layers"),
        report,
        DockerConfig.read(docker_config(), search_path()),
        docker_sockets(),
        proxies(),
    )


@click.command(cls=ProjectCommand)
@click.argument("source", metavar="SOURCE")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("-o", "--output", "target", required=True, metavar="F.eif", help="Where the image goes.")
@config_option
@click.option("--name", metavar="TEXT", help="The image's name, in its metadata; its program's.")
@click.option("--version", metavar="TEXT", help="The image's version, in its metadata.")
@click.option(
    "--arch", type=click.Choice([str(arch) for arch in Arch]), help="Refuse a kernel for another architecture."
)
@click.option("--lock", "lock", metavar="FILE", help=f"Record what it is made of; {LOCK} beside an enclave.toml.")
@click.option("--locked", "is_locked", is_flag=True, help="Make it of exactly what is recorded, or not at all.")
@click.option("--explain", is_flag=True, help="Show where each PCR comes from.")
@click.option("--compat", type=click.Choice(["nitro-cli"]), help="Measure the same as nitro-cli 1.5 would.")
@click.option("--blobs", metavar="DIR", help="nitro-cli's kernel, command line, init and nsm.ko, for --compat.")
@kernel_options
@image_options
@signing_options
@output_options
@click.pass_context
def build(
    ctx: click.Context,
    /,
    source: str,
    command: tuple[str, ...],
    target: str,
    lock: str | None,
    is_locked: bool,
    explain: bool,
    sign_cert: str | None,
    sign_key: str | None,
    pkcs11_module: str | None,
    output: Output,
    **words: Any,
) -> None:
    """Make an image of a container image or a root filesystem. The same inputs give the same bytes.

    SOURCE is docker://NAME, oci:DIR[:TAG], oci-archive:F[:TAG], docker-archive:F[:NAME:TAG], dir:DIR or tar:F. What
    runs in the enclave is the container image's entrypoint and command; a command after -- takes the latter's place, as
    with docker run. Without a SOURCE, enclave.toml says all that is not said here.
    """
    if bool(sign_cert) != bool(sign_key):
        raise UsageError("--sign-cert and --sign-key need each other", hint="enclave keygen makes both")
    del words["config"]
    lock_path = _lock_path(ctx, lock, is_locked)
    locked = _read_lock(lock_path) if is_locked and lock_path else None
    with layer_bars(output) as report:
        options = build_options(source, Path(target), command, locked=locked, report=report, **with_added(ctx, words))
        if sign_cert and sign_key:
            sign = make_signature(sign_cert, sign_key, pkcs11_module, output)
            options = replace(options, sign=sign, pcr8=certificate(sign_cert).pcr8)
        result = build_image(options)
    if lock_path and not locked:
        with replacing(lock_path) as file:
            file.write(result.lock.encode().encode())
    if words["kernel"] is None and not words["blobs"] and not locked:
        _hint_at_kernel(output)
    for warning in result.warnings:
        output.say(f"warning: {warning}")
    output.detail(f"{result.path}: {result.size} bytes, {result.arch}")
    made = {"Measurements": measurements_object(result.measurements, options.pcr8)}
    if explain:
        output.show({**made, "Explanation": explanation_object(result)}, lambda console: explain_text(result, console))
    else:
        output.result(made)


def _hint_at_kernel(output: Output) -> None:
    """Nobody chose the kernel, so it is the distribution's: say where it does not boot, and change nothing."""
    built = [one.name for one in kernels().all() if one.made.get("arch") == "x86_64"]
    how = f"--kernel {built[0]} takes one that does" if built else "enclave kernel build makes one that does"
    output.say(f"hint: this image's kernel, the distribution's, does not boot on EC2; {how}")


def _lock_path(ctx: click.Context, lock: str | None, is_locked: bool) -> Path | None:
    project = project_of(ctx)
    if lock is not None:
        return Path(lock)
    if project is not None:
        return project.lock
    return Path(LOCK) if is_locked else None


def _read_lock(path: Path) -> Lock:
    try:
        return Lock.parse(read_small(str(path), MAX_LOCK_SIZE))
    except FormatError as error:
        raise type(error)(f"{path}: {error.message}", hint="a build without --locked makes it anew") from error
