# SPDX-License-Identifier: Apache-2.0
"""``enclave sign`` and ``enclave resign``: with a key at hand, or in two steps with one that is elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import click

from enclavekit import eif
from enclavekit.cli.describe import certificate, naming, read_small, reading
from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output, printable
from enclavekit.environment import key_password, pkcs11_pin
from enclavekit.errors import SigningError, UsageError
from enclavekit.linux.atomic import replacing
from enclavekit.signing.signer import KeyReference, open_signer

MAX_SIGNATURE = 1024
Command = Callable[..., Any]


def signing_options(command: Command) -> Command:
    """The certificate and the key."""
    for option in reversed(
        [
            click.option("--sign-cert", "sign_cert", metavar="PEM", help="The signing certificate."),
            click.option(
                "--sign-key",
                "sign_key",
                metavar="KEY",
                help="Its key: a PEM file, a KMS key's ARN, or a pkcs11: URI.",
            ),
            click.option("--pkcs11-module", metavar="PATH", help="The token's library, where the URI names none."),
        ]
    ):
        command = option(command)
    return command


def make_signature(sign_cert: str, sign_key: str, module: str | None, output: Output) -> eif.Sign:
    """What makes the signature section when the image is measured; key and certificate are checked here already."""
    chosen = certificate(sign_cert)
    warn_of_expiry(chosen, output)
    reference = KeyReference(sign_key, module, pkcs11_pin(), key_password())
    # Once now, so that a wrong PIN or another's key fails before the work is done; the signature itself comes after it.
    with open_signer(reference) as signer:
        chosen.check_key(signer.public_key)

    def sign(measurements: eif.Measurements) -> bytes:
        with open_signer(reference) as signer:
            return bytes(eif.sign(measurements.pcr0, chosen, signer))

    return sign


def warn_of_expiry(chosen: eif.SigningCertificate, output: Output) -> None:
    """A word about a certificate that has expired, or soon will have."""
    warning = chosen.warning(datetime.now(UTC))
    if warning:
        output.say(f"warning: {warning}")


def _options(command: Command) -> Command:
    for option in (
        output_options,
        click.option("--signature-in", metavar="FILE", help="Detached: put in a signature of it (DER, or R and S)."),
        click.option("--digest-out", metavar="FILE", help="Detached: write what is to be signed, a digest."),
        signing_options,
        click.option("-o", "--output", "target", metavar="F.eif", help="Write there instead of in place."),
        click.argument("image", metavar="F.eif"),
    ):
        command = cast(Callable[[Command], Command], option)(command)
    return command


@click.command()
@_options
def sign(image: str, output: Output, **words: Any) -> None:
    """Sign an image: PCR0, which covers kernel, command line and all ramdisks.

    The image is replaced only when its signature holds. A key that only others can use signs in two steps: --digest-out
    writes the digest to be signed (SHA-256, -384 or -512, as goes with the certificate's curve); later --signature-in
    puts the signature into the image. Passwords and PINs come from ENCLAVEKIT_KEY_PASSWORD and ENCLAVEKIT_PIN.
    """
    _sign(image, output, again=False, **words)


@click.command()
@_options
def resign(image: str, output: Output, **words: Any) -> None:
    """Replace an image's signature; mends sizes that other tools have left wrong. Options are those of sign."""
    _sign(image, output, again=True, **words)


def _sign(
    image: str,
    output: Output,
    *,
    again: bool,
    target: str | None,
    sign_cert: str | None,
    sign_key: str | None,
    pkcs11_module: str | None,
    digest_out: str | None,
    signature_in: str | None,
) -> None:
    if not sign_cert:
        raise UsageError("missing option '--sign-cert'", hint="enclave keygen makes a key and its certificate")
    if sum(map(bool, (sign_key, digest_out, signature_in))) != 1:
        raise UsageError("expected one of --sign-key, --digest-out and --signature-in", hint="enclave sign --help")
    if digest_out and target:
        raise UsageError("--digest-out writes no image, so there is no place for --output")
    chosen = certificate(sign_cert)
    if sign_key:
        make = make_signature(sign_cert, sign_key, pkcs11_module, output)
    else:
        warn_of_expiry(chosen, output)
        made_elsewhere = read_small(signature_in, MAX_SIGNATURE) if signature_in else b""
        make = partial(_attach, chosen, made_elsewhere)
    with reading(image) as file, naming(image):
        found, measured = eif.measure_to_sign(file, image)
        if again != (found.signature is not None):
            state, verb = ("not signed yet", "sign") if again else ("signed already", "resign")
            raise SigningError("the image is " + state, hint=f"enclave {verb}")
        if digest_out:
            _write_digest(digest_out, chosen, measured.measurements, output)
            return
        with replacing(Path(target or image)) as out:
            written = eif.write_signed(out, file, found, measured, make, name=image)
    result = {"Measurements": eif.measurements_object(written.measurements, chosen.pcr8)}
    name = printable(target or image)
    output.show(result, lambda console: console.print(f"{name}: signed, PCR8 {chosen.pcr8.hex()}", markup=False))


def _attach(chosen: eif.SigningCertificate, signature: bytes, measurements: eif.Measurements) -> bytes:
    return bytes(eif.signed(measurements.pcr0, chosen, signature))


def _write_digest(path: str, chosen: eif.SigningCertificate, measurements: eif.Measurements, output: Output) -> None:
    warn_of_expiry(chosen, output)
    digest = eif.unsigned(measurements.pcr0, chosen).digest("signature")
    with replacing(Path(path)) as out:
        out.write(digest)
    algorithm = chosen.algorithm
    result = {
        "schema": 1,
        "Digest": digest.hex(),
        "HashAlgorithm": algorithm.hash,
        "Algorithm": algorithm.name,
        "Measurements": eif.measurements_object(measurements, chosen.pcr8),
    }
    output.show(
        result, lambda console: console.print(f"{printable(path)}: {algorithm.hash} {digest.hex()}", markup=False)
    )
