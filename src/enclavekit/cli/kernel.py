# SPDX-License-Identifier: Apache-2.0
"""``enclave kernel``: the guest kernels that ``--kernel NAME`` and lock files know, and a build of our own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output
from enclavekit.cli.progress import bars
from enclavekit.cli.runtime import runtime_root
from enclavekit.codec.bzimage import READ_SIZE
from enclavekit.eif import FileContent
from enclavekit.environment import cache_directory, data_directory
from enclavekit.errors import FileError, NoKernelError
from enclavekit.image.kernel import parse_kernel
from enclavekit.image.kernel_carriers import Verdict, verdicts
from enclavekit.image.kernel_features import Answer, Feature, KernelFeatures, kernel_features
from enclavekit.linux.atomic import replacing
from enclavekit.runtime import Runtime
from enclavekit.runtime.kernels import Kernels, KnownKernel

if TYPE_CHECKING:
    from rich.console import Console


def kernels() -> Kernels:
    """The user's."""
    return Kernels(data_directory() / "kernels", runtime_root())


@click.group()
def kernel() -> None:
    """Guest kernels: the runtime's, those that you have built, and those that you have imported."""


@kernel.command("list")
@output_options
def list_kernels(output: Output) -> None:
    """All that are known, and where each boots."""
    found = [(one, *_judged(one)) for one in kernels().all()]

    def render(console: Console) -> None:
        for one, _, judged in found:
            where = " ".join(verdict.carrier for verdict in judged if verdict.boots is Answer.YES) or "nowhere"
            console.print(f"{one.name}  {one.origin}  {one.digest[:23]}…  boots on: {where}", markup=False)
        if not found:
            console.print("none: enclave runtime install, or enclave kernel build", markup=False)

    output.show({"schema": 1, "kernels": [_as_dict(*each) for each in found]}, render)


@kernel.command()
@click.argument("name", metavar="NAME")
@output_options
def show(name: str, output: Output) -> None:
    """One of them: what it has, where it boots, and why not elsewhere."""
    known = kernels().all()
    one = next((each for each in known if each.name == name), None)
    if one is None:
        names = ", ".join(each.name for each in known) or "none"
        raise NoKernelError(f"kernel {name[:64]!r}: none of that name (known: {names})", hint="enclave kernel list")
    features, judged = _judged(one)

    def render(console: Console) -> None:
        lines = {"name": one.name, "version": one.version, "origin": one.origin, "digest": one.digest}
        lines |= {"path": str(one.path), "modules": str(one.modules) if one.modules else ""}
        lines |= {key: str(one.made[key]) for key in ("source", "compiler") if key in one.made}
        lines["fragments"] = ", ".join(one.made.get("fragments", ()))
        for key, value in lines.items():
            if value:
                console.print(f"{key:<10} {value}", markup=False)
        for verdict in judged:
            why = f": {'; '.join(verdict.reasons)}" if verdict.reasons else ""
            console.print(f"{verdict.carrier:<10} {verdict.boots.value}{why}", markup=False)
        has = ", ".join(sorted(_word(feature) for feature in features.found)) or "unknown"
        console.print(f"has        {has}", markup=False)

    output.show({"schema": 1, "kernel": _as_dict(one, features, judged)}, render)


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
        {"schema": 1, "kernel": _as_dict(added, *_judged(added))},
        lambda console: console.print(f"{added.name}  {added.digest}", markup=False),
    )


@kernel.command()
@click.option("--version", default="6.12", show_default=True, metavar="X.Y", help="Of your distribution's sources.")
@click.option("--arch", type=click.Choice(["x86_64", "aarch64"]), default="x86_64", show_default=True)
@click.option(
    "--fragment",
    "fragments",
    multiple=True,
    metavar="FILE|NAME",
    help="More options; netfilter, or a file. Repeatable.",
)
@click.option("--name", metavar="NAME", help="What it is called here; its version, with a mark where it has fragments.")
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Copy kernel and configuration here.",
)
@click.option("--newest", is_flag=True, help="Of the mirror now, not what was fetched before.")
@output_options
def build(
    version: str,
    arch: str,
    fragments: tuple[str, ...],
    name: str | None,
    target: Path | None,
    newest: bool,
    output: Output,
) -> None:
    """Build a small kernel that boots the same on this machine and on EC2. The same inputs give the same bytes.

    Source and compiler come from your distribution's packages, as the runtime does, without root. What was built before
    is not built again. Takes minutes: six on two cores.
    """
    from enclavekit.kernel.build import KernelRequest, build_kernel
    from enclavekit.kernel.configuration import Target

    with bars(output) as tell:
        built = build_kernel(
            KernelRequest(version, Target(arch), fragments, name, newest),
            runtime=Runtime(runtime_root()),
            kernels=kernels(),
            cache=cache_directory() / "kernel-build",
            report=tell,
        )
    one = built.kernel
    if target is not None:
        _copy_out(one, target)
    if built.seconds is None:
        output.say("built before from the same inputs: nothing to do")
    else:
        output.say(f"built in {built.seconds:.0f} s")
    output.say(f"use it: enclave build --kernel {one.name}")
    output.show(
        {"schema": 1, "kernel": _as_dict(one, *_judged(one)), "cached": built.seconds is None},
        lambda console: console.print(f"{one.name}  {one.digest}", markup=False),
    )


def _copy_out(one: KnownKernel, target: Path) -> None:
    """Kernel and configuration, each whole or not at all; named so that ``--kernel FILE`` finds the latter."""
    kernel_name = "Image" if one.made.get("arch") == "aarch64" else "bzImage"
    try:
        target.mkdir(parents=True, exist_ok=True)
        for source, name in ((one.path, kernel_name), (one.path.with_name("kernel.config"), f"{kernel_name}.config")):
            data = source.read_bytes()
            with replacing(target / name) as file:
                file.write(data)
    except OSError as error:
        raise FileError.of(error, error.filename or target, "write") from error


def _judged(one: KnownKernel) -> tuple[KernelFeatures, list[Verdict]]:
    try:
        with one.path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            arch, _, _ = parse_kernel(file.read(READ_SIZE), size)
            features = kernel_features(FileContent(file, 0, size, str(one.path)))
    except OSError as error:
        raise FileError.of(error, one.path, "read") from error
    names = (
        {path.name.partition(".ko")[0].replace("-", "_") for path in one.modules.rglob("*.ko*")} if one.modules else ()
    )
    return features, verdicts(features, arch, names)


def _as_dict(one: KnownKernel, features: KernelFeatures, judged: list[Verdict]) -> dict[str, Any]:
    return {
        "name": one.name,
        "version": one.version,
        "origin": one.origin,
        "path": str(one.path),
        "digest": one.digest,
        "made": dict(one.made),
        "features": {_word(feature): features.has(feature).value for feature in Feature},
        "learned_from": features.learned_from.value,
        "boots": {
            verdict.carrier.value: {"boots": verdict.boots.value, "reasons": list(verdict.reasons)}
            for verdict in judged
        },
    }


def _word(feature: Feature) -> str:
    return feature.name.lower().replace("_", "-")
