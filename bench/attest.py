# SPDX-License-Identifier: Apache-2.0
"""How long reading and verifying an attestation document takes, against the signature checks that it cannot do without.

cold       five P-384 checks: the four certificates below the pinned root, which is known, and the document
cached     two: of a leaf that is new, below a chain that is known, and of the document
repeated   one: the document's, for the leaf is known too

The base does just these checks, with keys that are loaded already, over the same bytes. Both run in turns; of each the
fastest run is compared, in CPU time, for what else runs on the machine slows both, and not by as much. Reading is
compared with nothing: its time is given.

    python bench/attest.py [--rounds 200] [--seconds 3]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/unit/attest"))

from made_documents import INSTANCE, MADE, PCRS, certificates, document, links, root_of

from enclavekit.attest import Document, Policy, Verifier

POLICY = Policy(accepted=[{index: PCRS[index] for index in range(3)}])
LEAVES = 64


def make_documents() -> tuple[list[bytes], tuple[bytes, ...]]:
    """Of as many enclaves of one instance, and the chain of the first."""
    first = certificates(links())
    instance, leaf = links()[-2:]
    made = []
    for number in range(LEAVES):
        module = f"{INSTANCE}-enc{number:016x}"
        below = replace(leaf, name=f"{module}.us-east-1.test").certificate(instance)
        made.append(document((*first[:-1], below), module_id=module, nonce=bytes(32), user_data=bytes(64)))
    return made, first


def base_checks(raw: bytes) -> list[Callable[[], None]]:
    """The document's own check, and that of each certificate below the root, the leaf's first."""
    read = Document.parse(raw)
    ders = [*read.unverified.cabundle, read.unverified.certificate]
    chain = [x509.load_der_x509_certificate(der) for der in ders]
    keys = [certificate.public_key() for certificate in chain]
    numbers = (int.from_bytes(read.signature[:48], "big"), int.from_bytes(read.signature[48:], "big"))
    work = [(keys[-1], encode_dss_signature(*numbers), read.to_be_signed())]
    for index in range(len(chain) - 1, 0, -1):
        work.append((keys[index - 1], chain[index].signature, chain[index].tbs_certificate_bytes))
    algorithm = ECDSA(SHA384())
    return [lambda one=one: one[0].verify(one[1], one[2], algorithm) for one in work]  # type: ignore[misc]


def timed(work: Callable[[], object]) -> float:
    """Seconds on a CPU: what else runs on the machine counts less so."""
    start = time.process_time()
    work()
    return time.process_time() - start


def judge_for(documents: list[bytes], root: object, seconds: float, done: multiprocessing.SimpleQueue[float]) -> None:
    """In a process of its own: documents a second, one verifier kept, leaves in turn."""
    verifier = Verifier([root], clock=lambda: MADE)  # type: ignore[list-item]
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        verifier.verify(documents[count % len(documents)], POLICY)
        count += 1
    done.put(count / (time.perf_counter() - start))


def main() -> None:
    """Print one JSON object; times in milliseconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=3)
    options = parser.parse_args()
    documents, chain = make_documents()
    root = root_of(chain)
    raw, checks = documents[0], base_checks(documents[0])
    names = ("read", "cold", "cached", "repeated", "five", "two", "one")
    times: dict[str, list[float]] = {name: [] for name in names}
    kept = Verifier([root], clock=lambda: MADE, cached_links=16)
    forgetful = Verifier([root], clock=lambda: MADE, cached_links=0)
    for number in range(options.rounds):
        times["read"].append(timed(lambda: Document.parse(raw)))
        times["cold"].append(timed(lambda: forgetful.verify(raw, POLICY)))
        times["five"].append(timed(lambda: [check() for check in checks]))
        other = documents[number % (LEAVES - 1) + 1]  # forgotten again since it was last seen: 16 links are kept
        times["cached"].append(timed(lambda other=other: kept.verify(other, POLICY)))  # type: ignore[misc]
        times["two"].append(timed(lambda: [check() for check in checks[:2]]))
        times["repeated"].append(timed(lambda other=other: kept.verify(other, POLICY)))  # type: ignore[misc]
        times["one"].append(timed(checks[0]))
    found = {name: round(min(values) * 1e3, 4) for name, values in times.items()}
    done: multiprocessing.SimpleQueue[float] = multiprocessing.SimpleQueue()
    processes = [
        multiprocessing.Process(target=judge_for, args=(documents, root, options.seconds, done)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    result = {
        "milliseconds": found,
        "ratios": {
            "cold / five checks": round(found["cold"] / found["five"], 3),
            "cached / two checks": round(found["cached"] / found["two"], 3),
            "repeated / one check": round(found["repeated"] / found["one"], 3),
        },
        "documents a second, two processes, leaves known": round(sum(done.get() for _ in processes)),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
