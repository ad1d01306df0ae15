# SPDX-License-Identifier: Apache-2.0
"""``enclave kms-policy``: what to write into a key policy so that only these images' enclaves use the key."""

from __future__ import annotations

import json
import re

import click

from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output
from enclavekit.cli.verify import merge_pcrs, parse_pcrs
from enclavekit.errors import UsageError

_NUMBERS = re.compile(r"[0-9]{1,2}(,[0-9]{1,2})*")
_ROLE = re.compile(r"arn:[a-z0-9-]+:iam::[0-9]{12}:role/[\w+=,.@/-]{1,512}", re.ASCII)
_INSTANCE = re.compile(r"i-[0-9a-f]{8,17}")
_EXPECTED = {
    "--role": "the ARN of a role like arn:aws:iam::111122223333:role/parent",
    "--instance-id": "an instance's id like i-0123456789abcdef0",
}


@click.command("kms-policy")
@click.argument("images", nargs=-1, metavar="F.eif...")
@click.option("--lock", "locks", multiple=True, metavar="FILE", help="The image with this enclave.lock; repeatable.")
@click.option("--pcrs", "numbers", default="0", show_default=True, metavar="N,N", help="Which of the image's PCRs.")
@click.option("--pcr", "named", multiple=True, metavar="N=HEX", help="This PCR besides; repeatable.")
@click.option("--role", metavar="ARN", help="Only on instances with this IAM role (PCR3).")
@click.option("--instance-id", metavar="ID", help="Only on this instance (PCR4).")
@output_options
def kms_policy(
    images: tuple[str, ...],
    locks: tuple[str, ...],
    numbers: str,
    named: tuple[str, ...],
    role: str | None,
    instance_id: str | None,
    output: Output,
) -> None:
    """The condition block for a KMS key policy: only enclaves of these images may use the key.

    PCR0 by default, which covers all that is measured; `--pcrs 8` allows whatever the image's signer signs. Put it into
    a statement that allows kms:Decrypt, kms:GenerateDataKey and the like, and let nobody change the policy.
    """
    from enclavekit.attest.kms_policy import condition
    from enclavekit.attest.policy import eif_pcrs, lock_pcrs, pcr_of_text

    if not images and not locks:
        raise UsageError("kms-policy: expected an image or --lock", hint="enclave kms-policy --help")
    if not _NUMBERS.fullmatch(numbers) or any(int(number) > 31 for number in numbers.split(",")):
        raise UsageError(f"--pcrs: got {numbers[:32]!r}, expected numbers from 0 to 31 like 0,8")
    besides = parse_pcrs(named)
    for option, text, form, number in (
        ("--role", role, _ROLE, 3),
        ("--instance-id", instance_id, _INSTANCE, 4),
    ):
        if text is not None:
            if not form.fullmatch(text):
                raise UsageError(f"{option}: got {text[:64]!r}, expected {_EXPECTED[option]}")
            besides = merge_pcrs(besides, {number: pcr_of_text(text)})
    accepted = [merge_pcrs(values, besides) for values in (*map(eif_pcrs, images), *map(lock_pcrs, locks))]
    made = condition(accepted, [*map(int, numbers.split(",")), *besides])
    output.say("whoever may call kms:PutKeyPolicy on the key can take this condition away")
    block = {"Condition": made}
    output.show(block, lambda console: console.print(json.dumps(block, indent=2), markup=False))
