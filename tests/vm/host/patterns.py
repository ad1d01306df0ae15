# SPDX-License-Identifier: Apache-2.0
"""In a lab's parent: fill what is donated, before and after, and look for the enclave's pattern in all memory.

patterns.py IMAGE SCANNER OWN OTHER, where OWN and OTHER are as for pattern.c. Prints what each side found, of its own
and of the other's; then waits for its input's end, while the host looks, and closes the enclave.
"""

from __future__ import annotations

import mmap
import select
import socket
import subprocess
import sys
from pathlib import Path

from enclavekit import eif
from enclavekit.hypervisor.contract import ImageKind, LaunchSpec, Mode
from enclavekit.hypervisor.launch import write_image
from enclavekit.hypervisor.nitro import NitroCarrier

MEMORY = 160 << 20
PORT = 7000


def main(path: Path, scanner: str, own: str, other: str) -> None:
    """Once."""
    pattern = bytes([int(own, 0) ^ 0xFF])
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, PORT))
    listener.listen()
    with path.open("rb") as image:
        size = eif.read(image).size
        enclave = NitroCarrier().create(LaunchSpec("1", MEMORY, 2, size, eif.Discovery.ACPI, Path()))
        try:
            regions = enclave.allocate(MEMORY)
            pages = [page for page in (region.buffer.obj for region in regions) if isinstance(page, mmap.mmap)]

            def fill() -> None:
                for page in pages:
                    page[:] = pattern * len(page)

            fill()
            image.seek(0)
            write_image(image, size, regions, enclave.image_load_offset(ImageKind.EIF))
            for region in regions:
                enclave.set_user_memory_region(region)
            for _ in range(2):
                enclave.add_vcpu()
            enclave.start(mode=Mode.PRODUCTION)
            select.select([enclave.heartbeat_fd()], [], [])
            peer, _ = listener.accept()
            peer.recv(1)
            fill()
            found = subprocess.run([scanner, "scan", own, other], capture_output=True, text=True, check=True).stdout
            sys.stdout.write(f"{found.strip()}\n")
            peer.sendall(b"g")
            sys.stdout.write(f"{peer.makefile().read()}\n")
            sys.stdout.flush()
            sys.stdin.read()
        finally:
            enclave.close()


main(Path(sys.argv[1]), *sys.argv[2:])
