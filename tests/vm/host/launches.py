# SPDX-License-Identifier: Apache-2.0
"""In a lab's parent: launch an image many times, one after the other, each to its end. launches.py IMAGE COUNT.

Prints the CID of each, and at the end how many huge pages are free and how many there are.
"""

from __future__ import annotations

import select
import sys
from pathlib import Path

from enclavekit import eif
from enclavekit.hypervisor.contract import LaunchSpec, Mode
from enclavekit.hypervisor.launch import launch
from enclavekit.hypervisor.nitro import NitroCarrier

MEMORY = 128 << 20
PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def main(path: Path, count: int) -> None:
    """All of them."""
    with path.open("rb") as image:
        spec = LaunchSpec("1", MEMORY, 2, eif.read(image).size, eif.Discovery.ACPI, Path())
        for _ in range(count):
            image.seek(0)
            enclave = launch(NitroCarrier().create, spec, image, mode=Mode.PRODUCTION)
            try:
                if not select.select([enclave.heartbeat_fd()], [], [], 60)[0]:
                    raise SystemExit(f"CID {enclave.cid}: no heartbeat")
                poller = select.poll()
                poller.register(enclave.fileno(), 0)
                if not poller.poll(60_000):
                    raise SystemExit(f"CID {enclave.cid}: no end")
            finally:
                enclave.close()
            sys.stdout.write(f"{enclave.cid}\n")
            sys.stdout.flush()
    sys.stdout.write(" ".join((PAGES / name).read_text().strip() for name in ("free_hugepages", "nr_hugepages")) + "\n")


main(Path(sys.argv[1]), int(sys.argv[2]))
