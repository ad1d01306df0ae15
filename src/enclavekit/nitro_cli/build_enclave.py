# SPDX-License-Identifier: Apache-2.0
"""``nitro-cli build-enclave`` over our builder.

With nitro-cli's blobs (in NITRO_CLI_BLOBS, or where it installs them) what is measured is as nitro-cli makes it. Where
there are none, the image gets this package's init and kernel, and docker's meaning of ENTRYPOINT, WORKDIR and USER. A
container image comes from a docker daemon, if one has it, and otherwise from its registry.

Source: aws-nitro-enclaves-cli src/common/commands_parser.rs, enclave_build/src.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from enclavekit import eif
from enclavekit.build.application import Application
from enclavekit.build.dockerfile import build_dockerfile
from enclavekit.build.image import BuildOptions, BuildResult, KernelChoice, build
from enclavekit.build.nitro_cli import Blobs
from enclavekit.build.source import Access
from enclavekit.environment import (
    cache_directory,
    data_directory,
    docker_config,
    docker_sockets,
    nitro_cli_blobs,
    proxies,
    search_path,
    source_date_epoch,
)
from enclavekit.errors import Error, FileError, NoDockerError, NoImageError, OfflineError, SigningError, SourceError
from enclavekit.image.layer_cache import LayerCache
from enclavekit.image.registry_auth import DockerConfig
from enclavekit.nitro_cli.codes import Code
from enclavekit.nitro_cli.command import NitroCliError, failing, opened, pkcs11, print_json, read_certificate
from enclavekit.runtime.kernels import Kernels
from enclavekit.signing.signer import KeyReference, open_signer

MAX_METADATA_SIZE = 4096


@click.command("build-enclave")
@click.option("--docker-uri", required=True, metavar="NAME", help="The container image.")
@click.option("--docker-dir", metavar="DIR", help="A directory with a Dockerfile, to build it of first.")
@click.option("--output-file", required=True, metavar="F.eif", help="Where the image goes.")
@click.option("--signing-certificate", "cert", metavar="PEM", help="The signing certificate.")
@click.option("--private-key", "key", metavar="KEY", help="Its key: a PEM file, or a KMS key's ARN.")
@click.option("--name", metavar="TEXT", help="The image's name, in its metadata.")
@click.option("--version", metavar="TEXT", help="The image's version, in its metadata.")
@click.option("--metadata", metavar="FILE", help="JSON of at most 4096 bytes, for its metadata.")
def build_enclave(
    docker_uri: str, docker_dir: str | None, output_file: str, cert: str | None, key: str | None, **words: str | None
) -> None:
    """Build an image of a container image."""
    if (cert is None) != (key is None):
        raise click.UsageError("--signing-certificate and --private-key need each other")
    click.echo("Start building the Enclave Image...", err=True)
    with failing(Code.EIF_BUILDING):
        options = BuildOptions(
            source=f"docker://{docker_uri}",
            output=Path(output_file),
            application=Application(),
            access=Access(
                LayerCache(cache_directory() / "layers"),
                docker_config=DockerConfig.read(docker_config(), search_path()),
                docker_sockets=docker_sockets(),
                proxies=proxies(),
            ),
            epoch=source_date_epoch(),
            name=words["name"] or _image_name(docker_uri),
            version=words["version"],
            custom=_metadata(words["metadata"]) if words["metadata"] else None,
            docker_info=True,
            **_boot(),
        )
    if cert is not None and key is not None:
        options = _signed(options, cert, key)
    with tempfile.TemporaryDirectory(prefix="enclavekit-") as scratch:
        if docker_dir is not None:
            with failing(Code.DOCKER_BUILD):
                source = build_dockerfile(Path(docker_dir), docker_uri, path=search_path(), scratch=Path(scratch))
            result = _build(replace(options, source=source))
        else:
            result = _build_named(options, docker_uri)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo("Enclave Image successfully created.", err=True)
    print_json({"Measurements": eif.measurements_object(result.measurements, options.pcr8)})


def _build_named(options: BuildOptions, name: str) -> BuildResult:
    """Of the daemon's image, if there is a daemon and it has one."""
    if options.access.docker_sockets and "@" not in name:
        try:
            result = build(replace(options, source=f"docker-daemon:{name}"))
        except (NoDockerError, NoImageError):
            pass
        except Error as error:
            raise _failure(error) from error
        else:
            click.echo("Using the locally available Docker image...", err=True)
            return result
    return _build(options)


def _build(options: BuildOptions) -> BuildResult:
    try:
        return build(options)
    except Error as error:
        raise _failure(error) from error


def _failure(error: Error) -> NitroCliError:
    codes = {
        SigningError: Code.SIGNING,
        SourceError: Code.DOCKER_PULL,
        OfflineError: Code.DOCKER_PULL,
        FileError: Code.FILE_OPERATION,
    }
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), Code.EIF_BUILDING)
    return NitroCliError(code, f"{error.message}{f' ({error.hint})' if error.hint else ''}")


def _boot() -> dict[str, Any]:
    """nitro-cli's kernel and init, or ours."""
    directory = nitro_cli_blobs()
    if directory is not None:
        with failing(Code.BLOBS_PATH):
            blobs = Blobs(directory)
            return {"blobs": blobs, "kernel": KernelChoice(blobs.kernel, None, blobs.kernel.name)}
    with failing(Code.BLOBS_PATH):
        kernel = Kernels(data_directory() / "kernels", data_directory() / "runtime").choose(None, None)
    click.echo("No nitro-cli blobs here: the image gets enclavekit's init and kernel.", err=True)
    return {"kernel": KernelChoice(kernel.path, kernel.modules, kernel.name)}


def _signed(options: BuildOptions, cert: str, key: str) -> BuildOptions:
    with failing(Code.SIGNING):
        certificate = eif.SigningCertificate(read_certificate(cert))
        reference = KeyReference(key, *pkcs11())
        with open_signer(reference) as signer:
            certificate.check_key(signer.public_key)

    def sign(measurements: eif.Measurements) -> bytes:
        with open_signer(reference) as signer:
            return bytes(eif.sign(measurements.pcr0, certificate, signer))

    return replace(options, sign=sign, pcr8=certificate.pcr8)


def _metadata(path: str) -> Any:  # noqa: ANN401 - any JSON
    with failing(Code.FILE_OPERATION), opened(path) as file:
        data = file.read(MAX_METADATA_SIZE + 1)
    if len(data) > MAX_METADATA_SIZE:
        raise NitroCliError(Code.FILE_OPERATION, f"{path}: more than {MAX_METADATA_SIZE} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NitroCliError(Code.SERDE, f"{path}: no JSON") from error


def _image_name(uri: str) -> str:
    """Without its tag; a registry's port stays."""
    head, slash, last = uri.partition("@")[0].rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}"
