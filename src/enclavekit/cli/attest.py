# SPDX-License-Identifier: Apache-2.0
"""``enclave attest``: ask a running enclave for an attestation document."""

from __future__ import annotations

import base64
from pathlib import Path

import click

from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output
from enclavekit.codec.init_frames import MAX_NONCE
from enclavekit.enclave.control import NONCE, ask
from enclavekit.enclave.directory import find
from enclavekit.environment import runtime_directory
from enclavekit.errors import ControlError, NoEnclaveError, UsageError
from enclavekit.linux.atomic import replacing

TIMEOUT_S = 60.0


@click.command()
@click.argument("name")
@click.option("--nonce", required=True, metavar="HEX", help="What the document must have in it: random, used once.")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), metavar="FILE", help="The document's bytes.")
@output_options
def attest(name: str, nonce: str, target: Path | None, output: Output) -> None:
    """An attestation document of a running enclave, in base64, with a nonce in it.

    Its image must have opted in (`build --attest`); its application need not know. Pipe it into `enclave verify -`.
    """
    if not NONCE.fullmatch(nonce):
        raise UsageError(f"--nonce: got {nonce[:32]!r}, expected 1 to {MAX_NONCE} bytes in hexadecimal")
    path, _ = find(runtime_directory(), name)
    answer = ask(path, {"command": "attest", "nonce": nonce}, timeout_s=TIMEOUT_S)
    if answer is None:
        raise NoEnclaveError(f"enclave {name}: ended before it answered")
    try:
        document = bytes.fromhex(answer["document"])
    except (KeyError, TypeError, ValueError) as error:
        raise ControlError(f"enclave {name}: an answer without a document") from error
    text = base64.b64encode(document).decode()
    if target is not None:
        with replacing(target) as out:
            out.write(document)
    if output.json:
        output.result({"schema": 1, "document": text})
    elif target is None:
        output.result_text(text)
