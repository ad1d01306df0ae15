# SPDX-License-Identifier: Apache-2.0
"""Client, enclave and a relay between them, in one process, with documents of a development root made for the occasion.

    python demo.py app.eif

What stands for the enclave is a thread here, and its document is signed for the image as if it had been booted. The
rest is what runs in earnest: the TLS connections, the document and its verification.
"""

from __future__ import annotations

import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from client import connect, receive
from server import GREETING, Enclave

from enclavekit.attest import Policy, Root, Verifier
from enclavekit.attest.authority import Authority, DocumentSigner
from enclavekit.enclave.security_module import DEFAULT_INSTANCE, new_module_id
from enclavekit.errors import AttestationError


def main() -> None:
    """Once directly, once through the relay."""
    image = sys.argv[1]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        directory = Path(name, "authority")
        sign = DocumentSigner(Authority(directory), new_module_id(DEFAULT_INSTANCE, "00000000"))
        pcrs = Policy.from_eif(image).accepted[0]
        enclave = Enclave(lambda nonce, data: sign(pcrs, public_key=None, user_data=data, nonce=nonce))
        # A relay has a key of its own, and fetches the enclave's genuine document for the client's nonce.
        relay = Enclave(lambda nonce, _: enclave.document(nonce))
        enclave.document(bytes(32))
        root = Root.development_from_pem((directory / "root.pem").read_bytes(), "development root")
        for who, server in (("the enclave", enclave), ("a relay", relay)):
            near, far = socket.socketpair()
            work = pool.submit(server.serve, far)
            with near, far:
                try:
                    tls, verified = connect(near, Verifier([root]), image)
                    print(f"{who}: connected to {verified.module_id}: {receive(tls, len(GREETING)).decode().strip()}")
                    tls.close()
                except AttestationError as error:
                    print(f"{who}: refused: {error.message} ({error.code})")
                near.close()
                with suppress(OSError):
                    work.result()


if __name__ == "__main__":
    main()
