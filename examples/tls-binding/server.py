# SPDX-License-Identifier: Apache-2.0
"""The enclave's side: a TLS key that never leaves it, and a document that names it for everyone who asks.

python server.py PORT        in the enclave; listens on vsock
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from binding import LENGTH_SIZE, NONCE_SIZE, user_data
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

Attest = Callable[[bytes, bytes], bytes]
"""Nonce and user data in, a document out."""
GREETING = b"hello from inside an enclave\n\n\n\n"
VMADDR_CID_ANY = 0xFFFFFFFF
PATIENCE_S = 10


class Enclave:
    """A key, the certificate that TLS wants to see it in, and what signs documents."""

    def __init__(self, attest: Attest) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "enclave")])
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        certificate = builder.not_valid_after(now + datetime.timedelta(days=3650)).sign(key, SHA256())
        self._user_data = user_data(certificate.public_bytes(Encoding.DER))
        self._attest = attest
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        with tempfile.TemporaryDirectory() as directory:  # of the enclave's memory: it has no disk
            path = Path(directory, "tls.pem")
            path.touch(0o600)
            path.write_bytes(
                key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
                + certificate.public_bytes(Encoding.PEM)
            )
            self._context.load_cert_chain(path)

    def document(self, nonce: bytes) -> bytes:
        """That names the key. Anybody may have it: it is worth nothing without the key."""
        return self._attest(nonce, self._user_data)

    def serve(self, connection: socket.socket) -> None:
        """One client: its nonce, a document with it, and then whatever the enclave is for."""
        with self._context.wrap_socket(connection, server_side=True) as tls:
            nonce = tls.recv(NONCE_SIZE)
            if len(nonce) == NONCE_SIZE:
                document = self.document(nonce)
                tls.sendall(len(document).to_bytes(LENGTH_SIZE, "big") + document + GREETING)


def main() -> None:
    """Serve on a vsock port, with documents of the enclave's own NSM."""
    from enclavekit.nsm import Nsm

    with Nsm() as module, socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        enclave = Enclave(lambda nonce, data: module.attest(nonce=nonce, user_data=data))
        listener.bind((VMADDR_CID_ANY, int(sys.argv[1])))
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):  # whatever one client does, the next is served
                connection.settimeout(PATIENCE_S)
                enclave.serve(connection)


if __name__ == "__main__":
    main()
