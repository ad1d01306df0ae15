# SPDX-License-Identifier: Apache-2.0
"""How many attestation documents a security module makes in a second, against the one P-384 signature that each needs.

The module answers whole requests, CBOR to CBOR, as a guest sends them, without a guest. Both run in turns; of each the
fastest round is compared, in CPU time.

    python bench/nsm.py [--rounds 20]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cbor2
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384

from enclavekit.enclave.security_module import security_module
from enclavekit.hypervisor.contract import Mode

DOCUMENTS = 20
REQUEST = cbor2.dumps({"Attestation": {"nonce": bytes(32), "user_data": bytes(64), "public_key": None}})


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of one."""
    began = time.process_time()
    for _ in range(DOCUMENTS):
        work()
    return (time.process_time() - began) / DOCUMENTS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory:
        pcrs = {index: bytes([index + 1]) * 48 for index in range(3)}
        nsm = security_module(Path(directory) / "attestation", pcrs, enclave_id="00000000", mode=Mode.PRODUCTION)
        began = time.perf_counter()
        size = len(cbor2.loads(nsm.answer(REQUEST))["Attestation"]["document"])
        first_s = time.perf_counter() - began
        key = ec.generate_private_key(ec.SECP384R1())
        payload = bytes(size)
        pairs = [
            (timed(lambda: nsm.answer(REQUEST)), timed(lambda: key.sign(payload, ec.ECDSA(SHA384()))))
            for _ in range(rounds)
        ]
    ours, signature = min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)
    print(
        json.dumps(
            {
                "document_bytes": size,
                "first_ms": round(first_s * 1000, 1),
                "document_ms": round(ours * 1000, 3),
                "signature_ms": round(signature * 1000, 3),
                "ratio": round(ours / signature, 2),
                "documents_per_second": round(1 / ours),
            }
        )
    )


if __name__ == "__main__":
    main()
