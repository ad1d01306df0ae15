# SPDX-License-Identifier: Apache-2.0
"""``enclave verify``: judge an attestation document, or show one that is not judged."""

from __future__ import annotations

import re
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from enclavekit.cli.describe import read_small
from enclavekit.cli.options import output_options
from enclavekit.cli.output import Exit, Output, printable
from enclavekit.environment import attestation_directory
from enclavekit.errors import MissingError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from enclavekit.attest import Document, Policy, Root, Verified, Verifier

MAX_TEXT = 3 * (32 << 10)
"""Bytes of a document in hexadecimal digits, with line ends."""
MIN_NONCE = 16
OWN_TIME, NOW = "document", "now"
ROOT_FILE = "root.pem"
_PCR = re.compile(r"(?:PCR)?([0-9]{1,2})=([0-9a-f]{96})", re.IGNORECASE)
_LABEL = 12


@click.command()
@click.argument("source", metavar="DOC|-")
@click.option(
    "--eif", "images", multiple=True, metavar="F.eif", help="Enclaves of this image; repeatable: one of them."
)
@click.option("--lock", "locks", multiple=True, metavar="FILE", help="Of an image with this enclave.lock; repeatable.")
@click.option(
    "--pcr", "pcrs", multiple=True, metavar="N=HEX", help="This PCR, besides what the image says; repeatable."
)
@click.option("--any-measurement", is_flag=True, help="Whatever image runs.")
@click.option("--nonce", metavar="HEX", help="Made for this nonce.")
@click.option("--user-data", metavar="HEX", help="With these user data.")
@click.option("--public-key", metavar="HEX", help="With this public key.")
@click.option("--instance-id", metavar="ID", help="On this EC2 instance.")
@click.option("--max-age", type=click.FloatRange(min=0, min_open=True), metavar="S", help="Not older; 300 by default.")
@click.option(
    "--at", "at", default=NOW, metavar="now|document|TIME", help="Judge at its own time, or at 2026-01-01T00:00Z."
)
@click.option("--root", "roots", multiple=True, metavar="PEM", help="Trust this root instead of AWS's; repeatable.")
@click.option("--dev-root", is_flag=True, help="Trust the root of your own local enclaves, and no other.")
@click.option("--allow-debug", is_flag=True, help="Also in debug mode.")
@click.option("--kind", type=click.Choice(["enclave", "nitrotpm"]), default="enclave", help="Who made it; an enclave.")
@click.option("--inspect", is_flag=True, help="Show it UNVERIFIED, and judge nothing.")
@output_options
def verify(
    source: str, images: tuple[str, ...], locks: tuple[str, ...], roots: tuple[str, ...], at: str, output: Output,
    inspect: bool, dev_root: bool, **demands: Any,
) -> int:  # fmt: skip
    """Judge an attestation document: a file or standard input, raw, base64 or hexadecimal.

    Exit code 0 when all that is demanded is proven, 3 when not. Without an image, a lock or a PCR nothing is demanded
    of what runs, and it is refused. The chain must begin with a root of AWS's, unless --root or --dev-root says
    otherwise.
    """
    from enclavekit.attest import Document

    if inspect:
        if any(
            [images, locks, roots, dev_root, at != NOW, *(value for name, value in demands.items() if name != "kind")]
        ):
            raise UsageError("--inspect judges nothing, so there is nothing to demand or to trust")
        document = Document.parse_text(_read(source))
        _show_unverified(document, output)
        return Exit.DONE
    policy = _policy(images, locks, at=at, output=output, **demands)
    verifier = _verifier(roots, dev_root)
    moment = None if at in {NOW, OWN_TIME} else _time(at)
    document = Document.parse_text(_read(source))
    if at == OWN_TIME:
        verified = verifier.verify_archived(document, policy)
    elif moment:
        verified = verifier.verify_at(document, policy, moment)
    else:
        verified = verifier.verify(document, policy)
    _show_verified(verified, output)
    return Exit.DONE


def _policy(
    images: tuple[str, ...], locks: tuple[str, ...], *, output: Output, at: str, pcrs: tuple[str, ...],
    any_measurement: bool, nonce: str | None, user_data: str | None, public_key: str | None, instance_id: str | None,
    max_age: float | None, allow_debug: bool, kind: str,
) -> Policy:  # fmt: skip
    from enclavekit.attest import Kind, Policy
    from enclavekit.attest.policy import MAX_AGE_S, eif_pcrs, lock_pcrs

    named = parse_pcrs(pcrs)
    if any_measurement and (images or locks or named):
        raise UsageError("--any-measurement says that none is compared, so there is no place for an image, lock or PCR")
    if max_age is not None and at == OWN_TIME:
        raise UsageError("--max-age is the age at a time, and at its own time a document has none")
    accepted = [*map(eif_pcrs, images), *map(lock_pcrs, locks)]
    if nonce is not None and len(_hex("--nonce", nonce)) < MIN_NONCE:
        output.say(f"warning: --nonce: {len(nonce) // 2} bytes can be guessed, or seen again; take {MIN_NONCE} or more")
    return Policy(
        accepted=[merge_pcrs(values, named) for values in accepted] or ([named] if named else []),
        any_measurement=any_measurement,
        kind=Kind[kind.upper()],
        max_age_s=MAX_AGE_S if max_age is None else max_age,
        nonce=None if nonce is None else _hex("--nonce", nonce),
        user_data=None if user_data is None else _hex("--user-data", user_data, empty=True),
        public_key=None if public_key is None else _hex("--public-key", public_key),
        instance_id=instance_id,
        allow_debug=allow_debug,
    )


def parse_pcrs(words: tuple[str, ...]) -> dict[int, bytes]:
    """``8=HEX`` or ``PCR8=HEX``, each number once."""
    found: dict[int, bytes] = {}
    for word in words:
        match = _PCR.fullmatch(word)
        if match is None or int(match[1]) > 31:
            raise UsageError(f"--pcr: got {word[:64]!r}, expected N=HEX with N from 0 to 31 and 96 digits")
        index, value = int(match[1]), bytes.fromhex(match[2])
        if found.get(index, value) != value:
            raise UsageError(f"--pcr: two values for PCR{index}", hint="of several builds, name images or locks")
        found[index] = value
    return found


def merge_pcrs(values: dict[int, bytes], named: dict[int, bytes]) -> dict[int, bytes]:
    """Both; UsageError where they contradict each other."""
    for index in sorted(values.keys() & named.keys()):
        if values[index] != named[index]:
            raise UsageError(
                f"--pcr: PCR{index} is {named[index].hex()[:16]}…, the image's {values[index].hex()[:16]}…"
            )
    return values | named


def _verifier(roots: tuple[str, ...], dev_root: bool) -> Verifier:
    from enclavekit.attest import AWS_ROOTS, Root, Verifier

    if roots and dev_root:
        raise UsageError("--dev-root trusts no other root, so there is no place for --root")
    if dev_root:
        return Verifier([_development_root()])
    return Verifier([Root.from_pem(read_small(path), path) for path in roots] or AWS_ROOTS)


def _development_root() -> Root:
    from enclavekit.attest import Root

    path = attestation_directory() / ROOT_FILE
    if not path.exists():
        raise MissingError(
            f"no development root: {path} is not there",
            hint="it is made with the first local enclave: enclave run; the document of another machine needs --root",
        )
    return Root.development_from_pem(read_small(str(path)), str(path))


def _read(source: str) -> bytes:
    if source == "-":
        return sys.stdin.buffer.read(MAX_TEXT + 1)
    return read_small(source, MAX_TEXT)


def _hex(option: str, text: str, *, empty: bool = False) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError as error:
        raise UsageError(f"{option}: got {text[:32]!r}, expected hexadecimal digits, two a byte") from error
    if (not empty and not value) or len(value) > 1024:
        raise UsageError(f"{option}: {len(value)} bytes, expected 1 to 1024")
    return value


def _time(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise UsageError(
            f"--at: got {text[:32]!r}, expected now, document or a time with its zone like 2026-01-01T00:00Z"
        )
    return moment


def _show_verified(verified: Verified, output: Output) -> None:
    from enclavekit.attest.statement import not_proven, proven, verified_object

    def render(console: Console) -> None:
        from rich.text import Text

        style = "bold yellow" if verified.root.development else "bold green"
        console.print(Text("VERIFIED", style=style).append(f"  {_when(verified)}", style="not bold default"))
        console.print(Text("proven", style="dim"))
        for label, text in proven(verified):
            console.print(Text(f"  {label:<{_LABEL}}", style="dim").append(printable(text), style="not dim"))
        console.print(Text("not proven", style="dim"))
        for text in not_proven(verified):
            console.print(Text("  ").append(printable(text)))

    output.show(verified_object(verified), render)


def _when(verified: Verified) -> str:
    return f"as of {verified.at:%Y-%m-%d %H:%M:%S} UTC; its certificates until {verified.expires:%Y-%m-%d %H:%M:%S} UTC"


def _show_unverified(document: Document, output: Output) -> None:
    from enclavekit.attest.statement import unverified_object

    shown = unverified_object(document)

    def render(console: Console) -> None:
        from rich.text import Text

        console.print(Text("UNVERIFIED", style="bold red").append("  anybody can have written this", style="not bold"))
        for label, value in shown["document"].items():
            if label == "pcrs":
                for pcr, digest in value.items():
                    if int(digest, 16):
                        console.print(Text(f"  {pcr:<{_LABEL + 3}}", style="dim").append(digest, style="not dim"))
                continue
            text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            text = text if len(text) <= 128 else f"{text[:128]}… ({len(text) // 2} bytes)"
            console.print(Text(f"  {label:<{_LABEL + 3}}", style="dim").append(printable(text), style="not dim"))

    output.show(shown, render)
