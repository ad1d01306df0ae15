# SPDX-License-Identifier: Apache-2.0
"""``nitro-cli``: images (build-enclave, describe-eif, pcr, sign-eif), enclaves (run-enclave and the like), explain.

The same objects, words and exit codes.

Source: aws-nitro-enclaves-cli src/main.rs and src/lib.rs. JSON goes to stdout, all words to stderr. Where nitro-cli's
reader gives up on an image that hypervisors take (gaps between sections), this one does not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click

from enclavekit import __version__, eif
from enclavekit.environment import nitro_cli_logs, nitro_cli_words
from enclavekit.linux.atomic import replacing
from enclavekit.nitro_cli.codes import Code
from enclavekit.nitro_cli.command import (
    NitroCliError,
    failing,
    opened,
    pkcs11,
    print_json,
    read_certificate,
    sentence,
)
from enclavekit.nitro_cli.late_group import LateGroup
from enclavekit.nitro_cli.log import LOG, backtrace, start_log, stop_log, write_error
from enclavekit.signing.signer import KeyReference, open_signer

USAGE = 2

COMMANDS = {
    "build-enclave": "enclavekit.nitro_cli.build_enclave:build_enclave",
    "console": "enclavekit.nitro_cli.enclaves:console",
    "describe-enclaves": "enclavekit.nitro_cli.enclaves:describe_enclaves",
    "run-enclave": "enclavekit.nitro_cli.enclaves:run_enclave",
    "terminate-enclave": "enclavekit.nitro_cli.enclaves:terminate_enclave",
}


@click.group(
    name="nitro-cli",
    cls=LateGroup,
    late=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(
    __version__, "-V", "--version", prog_name="nitro-cli of enclavekit", message="%(prog)s %(version)s"
)
def nitro_cli() -> None:
    """The commands of nitro-cli, with its output and exit codes, on any Linux machine."""


@nitro_cli.command("describe-eif")
@click.option("--eif-path", required=True, metavar="F.eif", help="The image to describe.")
def describe_eif(eif_path: str) -> None:
    """What an image holds and measures."""
    with failing(Code.EIF_PARSING), opened(eif_path) as file:
        examined = eif.examine(file, eif_path)
        for error in (examined.metadata_error, examined.signature_error if not examined.signature else None):
            if error:
                raise error
        if examined.signature:
            examined.signature.check()  # over whatever it was made: for another image, SignatureCheck is false
            eif.certificate_object(examined.signature.certificate)
        custom = examined.metadata.custom if examined.metadata else None
        if custom is not None and not isinstance(custom, dict):
            raise NitroCliError(
                Code.SERDE, f"{eif_path}: custom metadata are {type(custom).__name__}, expected an object"
            )
        print_json(eif.describe_eif_object(examined))


@nitro_cli.command()
@click.option("--input", "path", metavar="FILE", help="A file, of whose bytes the PCR is.")
@click.option("--signing-certificate", "cert", metavar="PEM", help="A certificate, whose PCR8 is given.")
def pcr(path: str | None, cert: str | None) -> None:
    """The PCR that a file's bytes, or a certificate, would give."""
    if (path is None) == (cert is None):
        raise click.UsageError("one of --input and --signing-certificate is needed, and only one")
    if path is not None:
        with failing(Code.FILE_OPERATION), opened(path) as file:
            value = eif.extend(eif.digest_file(file, path)).hex()
        print_json({"PCR": value})
    elif cert is not None:
        with failing(Code.FILE_OPERATION):
            pem = read_certificate(cert)
        with failing(Code.HASHER):
            value = eif.SigningCertificate(pem).pcr8.hex()
        print_json({"PCR8": value})


@nitro_cli.command("sign-eif")
@click.option("--eif-path", metavar="F.eif", help="The image to sign, in place.")
@click.option("--signing-certificate", "cert", metavar="PEM", help="The signing certificate.")
@click.option("--private-key", "key", metavar="KEY", help="Its key: a PEM file, or a KMS key's ARN.")
def sign_eif(eif_path: str | None, cert: str | None, key: str | None) -> None:
    """Sign an image, or replace its signature."""
    if eif_path is None:
        raise NitroCliError(Code.MISSING_ARGUMENT, "the argument `eif-path` is missing")
    if (cert is None) != (key is None):
        raise click.UsageError("--signing-certificate and --private-key need each other")
    with failing(Code.SIGNING):
        if cert is None or key is None:
            raise NitroCliError(Code.SIGNING, "the arguments `signing-certificate` and `private-key` are missing")
        certificate = eif.SigningCertificate(read_certificate(cert))
        with opened(eif_path) as file, open_signer(KeyReference(key, *pkcs11())) as signer:
            image, measured = eif.measure_to_sign(file, eif_path)
            made = eif.sign(measured.measurements.pcr0, certificate, signer)
            with replacing(Path(eif_path)) as out:
                eif.write_signed(out, file, image, measured, lambda _: bytes(made), name=eif_path)
    click.echo("Enclave Image successfully signed.", err=True)
    print_json({"Measurements": eif.measurements_object(measured.measurements, certificate.pcr8)})


@nitro_cli.command()
@click.option("--error-code", required=True, metavar="Enn", help="As printed by a command that failed.")
def explain(error_code: str) -> None:
    """What an error code means."""
    code = Code.find(error_code)
    if code is None:
        click.echo(f"No such error code {error_code}", err=True)
    else:
        click.echo(f"{sentence(code.meaning)} {sentence(code.remedy)}", err=True)


def run_command(words: list[str], name: str = "nitro-cli") -> int:
    """Run one command line and return its exit code."""
    if not words:
        words = ["--help"]
        _to_stderr(lambda: nitro_cli.main(args=words, prog_name=name, standalone_mode=False))
        return USAGE
    try:
        _start_log()
        LOG.info("%s", words[0])
        nitro_cli.main(args=words, prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return USAGE
    except NitroCliError as failure:
        _tell(failure, words[0])
        return failure.code.number
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _start_log() -> None:
    directory = nitro_cli_logs()
    if directory is None:
        stop_log()
    else:
        start_log(directory, nitro_cli_words()[0])


def _tell(failure: NitroCliError, action: str) -> None:
    """Its text, and where the rest is: in a file, or with BACKTRACE=1 right here."""
    LOG.error("%s: %s", failure.code, failure.message)
    click.echo(failure.text(), err=True)
    details = backtrace(failure, action)
    directory = nitro_cli_logs()
    path = write_error(directory, f"{failure.text()}\n\n{details}") if directory is not None else None
    if nitro_cli_words()[1]:
        click.echo(f"\nBacktrace:\n{details}", err=True)
    elif path is not None:
        click.echo(f"\nThe backtrace is in {path}", err=True)


def main() -> NoReturn:
    """The program."""
    sys.exit(run_command(sys.argv[1:]))


def _to_stderr(call: Callable[[], object]) -> None:
    from contextlib import redirect_stdout

    with redirect_stdout(sys.stderr):
        call()
