# SPDX-License-Identifier: Apache-2.0
"""Every byte of every genuine document changed, to several other values: each is refused, by our own error.

    python tests/fuzz/mutations.py [--documents 3] [--values 8]

Needs ../shared/data/attestation; says so, and ends well, where it is not there. Bytes are changed to one with a bit
flipped (``--values`` of the eight). ``tests/unit/attest/test_mutations.py`` does the same with documents made there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/attest"))

from attestation_data import DIRECTORY, REAL, listed

from enclavekit.attest import Kind, Policy, Verifier
from enclavekit.errors import AttestationError


def check(entry: dict[str, str], values: int) -> int:
    """Mutants of one document, all refused; or an AssertionError that says which was not."""
    good = (REAL / entry["file"]).read_bytes()
    policy = Policy(any_measurement=True, allow_debug=True, kind=Kind[entry["kind"].upper()])
    verifier = Verifier()
    verifier.verify_archived(good, policy)
    for at in range(len(good)):
        for bit in range(values):
            changed = bytearray(good)
            changed[at] ^= 1 << (at + bit) % 8
            try:
                verifier.verify_archived(bytes(changed), policy)
            except AttestationError:
                continue
            raise AssertionError(f"{entry['file']}: byte {at} as 0x{changed[at]:02x} is accepted")
    return len(good) * values


def main() -> None:
    """All documents of the newest forms first, on all CPUs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--values", type=int, default=1)
    options = parser.parse_args()
    entries = listed(REAL / "index.json")[-options.documents :]
    if not entries:
        print(f"skipped: {DIRECTORY.name} is not there")
        return
    with multiprocessing.Pool() as pool:
        counts = pool.starmap(check, [(entry, options.values) for entry in entries])
    print(f"{len(entries)} documents, {sum(counts)} mutants, all refused")


if __name__ == "__main__":
    main()
