# SPDX-License-Identifier: Apache-2.0
"""``enclave keygen``: a key that signs images, and its certificate."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import click

from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output, printable
from enclavekit.environment import key_password, pkcs11_pin
from enclavekit.errors import FileError, UsageError
from enclavekit.linux.atomic import replacing


@click.command()
@click.option("--cert", "cert", required=True, metavar="PEM", help="Where the certificate goes.")
@click.option("--key", "key", metavar="PEM", help="Where the new key goes.")
@click.option(
    "--from", "reference", metavar="KEY", help="Certify this key: a KMS key's ARN, a pkcs11: URI, a PEM file."
)
@click.option("--curve", type=click.Choice(["P-256", "P-384", "P-521"]), help="Of the new key; P-384 by default.")
@click.option("--days", type=int, default=365, show_default=True, help="How long the certificate is valid.")
@click.option("--name", default="enclave signing key", show_default=True, help="Its common name.")
@click.option("--pkcs11-module", metavar="PATH", help="The token's library, where the URI names none.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@output_options
def keygen(
    cert: str,
    key: str | None,
    reference: str | None,
    curve: str | None,
    days: int,
    name: str,
    pkcs11_module: str | None,
    force: bool,
    output: Output,
) -> None:
    """Make a key and a self-signed certificate, with which images are signed; or a certificate for a key that exists.

    Whoever trusts PCR8 trusts this certificate. With ENCLAVEKIT_KEY_PASSWORD set, the new key is encrypted.
    """
    from enclavekit.signing.certificate import self_signed
    from enclavekit.signing.pem import PemSigner
    from enclavekit.signing.signer import KeyReference, open_signer

    if bool(key) == bool(reference):
        raise UsageError("expected --key for a new key or --from for one that exists", hint="enclave keygen --help")
    if reference and curve:
        raise UsageError("--curve is for a new key; one that exists has its own")
    for name_of_file in filter(None, (cert, key)):
        if Path(name_of_file).exists() and not force:
            raise FileError(f"{name_of_file}: exists already, and is left alone", hint="--force replaces it")
    with ExitStack() as files:
        if reference:
            found = KeyReference(reference, pkcs11_module, pkcs11_pin(), key_password())
            signer = files.enter_context(open_signer(found))
        else:
            signer = PemSigner.generate(curve or "P-384")
        made = self_signed(signer, common_name=name, first=datetime.now(UTC).replace(microsecond=0), days=days)
        # Both are on the disk before either takes its place.
        written = [(Path(cert), 0o666, made.pem)]
        if key and isinstance(signer, PemSigner):
            written.append((Path(key), 0o600, signer.pem(key_password())))
        for path, mode, data in written:
            out = files.enter_context(replacing(path, mode=mode))
            out.write(data)
            out.flush()
    result = {
        "schema": 1,
        "Key": key or reference,
        "Certificate": cert,
        "Algorithm": made.algorithm.name,
        "NotAfter": made.validity[1].isoformat(),
        "PCR8": made.pcr8.hex(),
    }
    output.show(result, lambda console: console.print(f"{printable(cert)}: PCR8 {made.pcr8.hex()}", markup=False))
