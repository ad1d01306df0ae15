# SPDX-License-Identifier: Apache-2.0
"""``enclave describe`` and ``enclave pcr``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from enclavekit import eif
from enclavekit.cli.options import output_options
from enclavekit.cli.output import Exit, Output, printable
from enclavekit.enclave.control import ask
from enclavekit.enclave.directory import NAME, State, find
from enclavekit.environment import runtime_directory
from enclavekit.errors import (
    CertificateError,
    ControlError,
    FileError,
    FormatError,
    NoEnclaveError,
    SignatureError,
    UsageError,
)
from enclavekit.linux.atomic import replacing

if TYPE_CHECKING:
    from rich.console import Console

MAX_CERTIFICATE = 1 << 20
PCR_MEANINGS = {
    "PCR0": "the whole image",
    "PCR1": "kernel, command line, first ramdisk",
    "PCR2": "the other ramdisks",
    "PCR8": "signing certificate",
}
PCR2_OF_NOTHING = eif.extend(eif.digest(b"")).hex()


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


def read_small(path: str, limit: int = MAX_CERTIFICATE) -> bytes:
    """All of a file that has to be held: a certificate, a signature."""
    with reading(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FormatError(f"{path}: larger than {limit} bytes")
    return data


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors in a file's bytes name the file."""
    try:
        yield
    except (FormatError, SignatureError) as error:
        raise type(error)(f"{path}: {error.message}", hint=error.hint) from error


@click.command()
@click.argument("image", metavar="F.eif|NAME")
@click.option("--strict", is_flag=True, help="Refuse what a hypervisor refuses, an expired certificate included.")
@click.option("--html", metavar="F.html", help="Also draw the image, as a page that needs nothing else.")
@output_options
def describe(image: str, strict: bool, html: str | None, output: Output) -> int:
    """What an image holds and measures, also of a damaged one; or how an enclave that runs is.

    -v adds the digests of an image's sections.

    --json gives nitro-cli's describe-eif object, and more.
    """
    if not Path(image).exists() and NAME.fullmatch(image):
        with contextlib.suppress(NoEnclaveError):
            path, state = find(runtime_directory(), image)
            now = status_of(path, state)
            output.show({"schema": 1, "enclave": now}, lambda console: _print_state(console, now))
            return Exit.DONE
    with reading(image), naming(image):
        described = eif.describe(
            Path(image), strict=strict, section_digests=output.verbose > 0 or output.json, at=datetime.now(UTC)
        )
    if html:
        _draw(image, html)
    output.show(described, lambda console: _print_description(console, image, described))
    fine = described["CheckCRC"] and described.get("SignatureCheck", True) and described["Accepted"]
    return Exit.DONE if fine else Exit.FAILED


def status_of(path: Path, state: State) -> State:
    """As an enclave's process says; one that does not answer is as it last wrote."""
    try:
        return ask(path, {"command": "status"}, timeout_s=2.0) or state
    except (NoEnclaveError, ControlError):
        return state


def _print_state(console: Console, state: State) -> None:
    from rich.text import Text

    for key, value in state.items():
        console.print(Text(f"{key:<15}", style="dim").append(printable(str(value)), style="not dim"))


def _draw(image: str, target: str) -> None:
    from enclavekit.inspection.html import render

    with reading(image) as file, naming(image):
        examined = eif.examine(file, image, section_digests=True)
        with replacing(Path(target)) as out:
            for piece in render(file, examined, image, datetime.now(UTC)):
                out.write(piece.encode("utf-8", "backslashreplace"))


def _print_description(console: Console, name: str, described: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    def line(label: str, text: str, style: str = "") -> None:
        console.print(Text(f"{label:<9}", style="dim").append(printable(text), style=style or "not dim"))

    signed = "signed" if described["IsSigned"] else "not signed"
    console.print(Text(printable(name), style="bold"))
    line("image", f"EIF version {described['EifVersion']} for {described['Architecture']}, {signed}")
    if "ImageName" in described:
        line("name", f"{described['ImageName']} {described['ImageVersion']}")
        build = described["Metadata"]
        line("built", f"{build['BuildTime']} by {build['BuildTool']} {build['BuildToolVersion']}")
        line("kernel", f"{build['OperatingSystem']} {build['KernelVersion']}")
    if "SigningCertificate" in described:
        certificate = described["SigningCertificate"]
        issuer = ", ".join(f"{key}={value}" for key, value in certificate["IssuerName"].items())
        line("signer", f"{issuer}, valid from {certificate['NotBefore']} to {certificate['NotAfter']}")
    for pcr, meaning in PCR_MEANINGS.items():
        value = described["Measurements"].get(pcr)
        if value:
            note = " (there is none)" if value == PCR2_OF_NOTHING else ""
            line(pcr, f"{value}  {meaning}{note}")
    digests = any("SHA384" in section for section in described["Sections"]) and console.width >= 140
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("section")
    table.add_column("offset", justify="right")
    table.add_column("size", justify="right")
    table.add_column("")
    if digests:
        table.add_column("SHA384", no_wrap=True)
    for section in described["Sections"]:
        cells = [section["Type"], f"0x{section['Offset']:x}", str(section["Size"]), eif.size_text(section["Size"])]
        table.add_row(*cells, *([section["SHA384"]] if digests else []))
    console.print(table)
    for warning in described["Warnings"]:
        console.print(Text("warning: ", style="yellow").append(printable(warning)))


@click.command()
@click.argument("files", nargs=-1, metavar="F...")
@click.option("--cert", metavar="PEM", help="The PCR8 of a signing certificate.")
@output_options
def pcr(files: tuple[str, ...], cert: str | None, output: Output) -> None:
    """The PCR that a file's bytes, or a certificate, would give."""
    if bool(files) == bool(cert):
        raise UsageError("pcr: expected files or --cert, one of them", hint="enclave pcr --help")
    if cert:
        value = certificate(cert).pcr8.hex()
        output.show({"PCR8": value}, lambda console: console.print(value))
        return
    found = {}
    for name in files:
        with reading(name) as file:
            found[name] = eif.extend(eif.digest_file(file, name)).hex()
    result: Any = [{"File": name, "PCR": value} for name, value in found.items()]
    if len(files) == 1:
        result = {"PCR": found[files[0]]}

    def lines(console: Console) -> None:
        for name, value in found.items():
            console.print(value if len(files) == 1 else f"{value}  {printable(name)}", markup=False)

    output.show(result, lines)


def certificate(path: str) -> eif.SigningCertificate:
    """A file's certificate, checked as far as one that signs images must be."""
    found = eif.SigningCertificate(read_small(path))
    with naming(path):
        if not found.key:
            raise CertificateError("certificate: no key")
    return found
