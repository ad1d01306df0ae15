# SPDX-License-Identifier: Apache-2.0
"""``enclave describe`` and ``enclave pcr``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click

from enclavekit import eif
from enclavekit.cli.options import output_options
from enclavekit.cli.output import Exit, Output
from enclavekit.errors import FileError, FormatError, UsageError

MAX_CERTIFICATE = 1 << 20


@contextmanager
def reading(path: str) -> Iterator[BinaryIO]:
    """An ordinary file, open; what cannot be opened is a ``FileError``."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise FileError(f"cannot read {path}: not an ordinary file")
        file = Path(path).open("rb")  # noqa: SIM115 - errors of the caller's are not of this file
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    with file:
        yield file


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors in a file's bytes name the file."""
    try:
        yield
    except FormatError as error:
        raise type(error)(f"{path}: {error.message}", hint=error.hint) from error


@click.command()
@click.argument("image", metavar="F.eif")
@output_options
def describe(image: str, output: Output) -> int:
    """What an image holds and measures, as nitro-cli's describe-eif prints it; -v adds digests of sections."""
    with naming(image):
        described = eif.describe(Path(image), section_digests=output.verbose > 0)
    output.result(described)
    return Exit.DONE if described["CheckCRC"] else Exit.FAILED


@click.command()
@click.argument("files", nargs=-1, metavar="F...")
@click.option("--cert", metavar="PEM", help="The PCR8 of a signing certificate.")
@output_options
def pcr(files: tuple[str, ...], cert: str | None, output: Output) -> None:
    """The PCR that a file's bytes, or a certificate, would give."""
    if bool(files) == bool(cert):
        raise UsageError("pcr: expected files or --cert, one of them", hint="enclave pcr --help")
    if cert:
        output.result({"PCR8": _certificate_pcr(cert)})
        return
    found = {}
    for name in files:
        with reading(name) as file:
            found[name] = eif.extend(eif.digest_file(file, name)).hex()
    if len(files) == 1:
        output.result({"PCR": found[files[0]]})
    else:
        output.result([{"File": name, "PCR": value} for name, value in found.items()])


def _certificate_pcr(path: str) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    with reading(path) as file:
        data = file.read(MAX_CERTIFICATE)
    try:
        certificate = x509.load_pem_x509_certificates(data)[0]
    except ValueError as error:
        raise FormatError(f"{path}: not a PEM certificate") from error
    return eif.extend(hashlib.sha384(certificate.public_bytes(Encoding.DER)).digest()).hex()
