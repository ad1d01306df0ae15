# SPDX-License-Identifier: Apache-2.0
"""``nitro-cli`` as far as images go: describe-eif, pcr, sign-eif, explain; the same objects, words and exit codes.

Source: aws-nitro-enclaves-cli src/main.rs and src/lib.rs. JSON goes to stdout, all words to stderr. Where nitro-cli's
reader gives up on an image that hypervisors take (gaps between sections), this one does not.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import click

from enclavekit import __version__, eif
from enclavekit.errors import CertificateError, Error, FileError, FormatError, MissingError, UsageError
from enclavekit.linux.atomic import replacing
from enclavekit.nitro_cli.codes import Code
from enclavekit.signing.signer import KeyReference, open_signer

HELP = "https://docs.aws.amazon.com/enclaves/latest/user/cli-errors.html"
MAX_CERTIFICATE = 1 << 20
USAGE = 2


class NitroCliError(Exception):
    """What ends a command: nitro-cli's code, and our words."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@click.group(
    name="nitro-cli",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Other commands of nitro-cli are not here yet.",
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
    with _failing(Code.EIF_PARSING), _opened(eif_path) as file:
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
        _print(eif.describe_eif_object(examined))


@nitro_cli.command()
@click.option("--input", "path", metavar="FILE", help="A file, of whose bytes the PCR is.")
@click.option("--signing-certificate", "cert", metavar="PEM", help="A certificate, whose PCR8 is given.")
def pcr(path: str | None, cert: str | None) -> None:
    """The PCR that a file's bytes, or a certificate, would give."""
    if (path is None) == (cert is None):
        raise click.UsageError("one of --input and --signing-certificate is needed, and only one")
    if path is not None:
        with _failing(Code.FILE_OPERATION), _opened(path) as file:
            value = eif.extend(eif.digest_file(file, path)).hex()
        _print({"PCR": value})
    elif cert is not None:
        with _failing(Code.FILE_OPERATION):
            pem = _certificate(cert)
        with _failing(Code.HASHER):
            value = eif.SigningCertificate(pem).pcr8.hex()
        _print({"PCR8": value})


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
    with _failing(Code.SIGNING):
        if cert is None or key is None:
            raise NitroCliError(Code.SIGNING, "the arguments `signing-certificate` and `private-key` are missing")
        certificate = eif.SigningCertificate(_certificate(cert))
        with _opened(eif_path) as file, open_signer(KeyReference(key, *_pkcs11())) as signer:
            image, measured = eif.measure_to_sign(file, eif_path)
            made = eif.sign(measured.measurements.pcr0, certificate, signer)
            with replacing(Path(eif_path)) as out:
                eif.write_signed(out, file, image, measured, lambda _: bytes(made), name=eif_path)
    click.echo("Enclave Image successfully signed.", err=True)
    _print({"Measurements": eif.measurements_object(measured.measurements, certificate.pcr8)})


@nitro_cli.command()
@click.option("--error-code", required=True, metavar="Enn", help="As printed by a command that failed.")
def explain(error_code: str) -> None:
    """What an error code means."""
    code = Code.find(error_code)
    if code is None:
        click.echo(f"No such error code {error_code}", err=True)
    else:
        click.echo(f"{_sentence(code.meaning)} {_sentence(code.remedy)}", err=True)


def run_command(words: list[str], name: str = "nitro-cli") -> int:
    """Run one command line and return its exit code."""
    if not words:
        words = ["--help"]
        _to_stderr(lambda: nitro_cli.main(args=words, prog_name=name, standalone_mode=False))
        return USAGE
    try:
        nitro_cli.main(args=words, prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return USAGE
    except NitroCliError as failure:
        code = failure.code
        click.echo(f"[ {code} ] {_sentence(code.meaning)} {_printable(failure.message)}", err=True)
        click.echo(f"\nFor more details, please visit {HELP}#{code}", err=True)
        return code.number
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def main() -> NoReturn:
    """The program."""
    sys.exit(run_command(sys.argv[1:]))


@contextmanager
def _failing(code: Code) -> Iterator[None]:
    """Errors of ours become nitro-cli's, with this code."""
    try:
        yield
    except Error as error:
        hint = f" ({error.hint})" if error.hint and isinstance(error, MissingError | UsageError) else ""
        raise NitroCliError(code, f"{error.message}{hint}") from error


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise FileError(f"cannot read {path}: not an ordinary file")
        file = Path(path).open("rb")  # noqa: SIM115 - errors of the block are not of opening
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    with file:
        try:
            yield file
        except FormatError as error:
            raise type(error)(f"{path}: {error.message}") from error
        except OSError as error:
            raise FileError.of(error, path, "read") from error


def _certificate(path: str) -> bytes:
    with _opened(path) as file:
        data = file.read(MAX_CERTIFICATE + 1)
        if len(data) > MAX_CERTIFICATE:
            raise CertificateError(f"certificate: larger than {MAX_CERTIFICATE} bytes")
        return data


def _pkcs11() -> tuple[str | None, str | None]:
    """Module and PIN, for keys named by a pkcs11: URI."""
    return os.environ.get("NITRO_CLI_PKCS11_MODULE") or None, os.environ.get("NITRO_CLI_PKCS11_PIN") or None


def _print(value: Any) -> None:  # noqa: ANN401 - any JSON
    """As serde_json prints: two spaces, no escapes but the needed ones."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    click.echo(text.encode("utf-8", "backslashreplace"))


def _to_stderr(call: Callable[[], object]) -> None:
    from contextlib import redirect_stdout

    with redirect_stdout(sys.stderr):
        call()


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
