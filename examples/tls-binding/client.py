# SPDX-License-Identifier: Apache-2.0
"""A TLS client that talks to an enclave of a certain image, and to nobody in between.

python client.py HOST PORT app.eif [--dev-root PEM]
"""

from __future__ import annotations

import argparse
import secrets
import socket
import ssl
from pathlib import Path

from binding import LENGTH_SIZE, NONCE_SIZE, user_data

from enclavekit.attest import AWS_ROOTS, Policy, Root, Verified, Verifier
from enclavekit.errors import Error, TruncatedError


def connect(connection: socket.socket, verifier: Verifier, *images: str) -> tuple[ssl.SSLSocket, Verified]:
    """The connection, encrypted up to the enclave; an AttestationError when it ends anywhere else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # no authority vouches for the enclave's key: the document does, below
    tls = context.wrap_socket(connection)
    try:
        certificate = tls.getpeercert(binary_form=True)
        if certificate is None:
            raise TruncatedError("TLS: the server has shown no certificate")
        nonce = secrets.token_bytes(NONCE_SIZE)
        tls.sendall(nonce)
        document = receive(tls, int.from_bytes(receive(tls, LENGTH_SIZE), "big"))
        policy = Policy.from_eif(*images, nonce=nonce, user_data=user_data(certificate))
        return tls, verifier.verify(document, policy)
    except BaseException:
        tls.close()
        raise


def receive(stream: socket.socket, size: int) -> bytes:
    """So many bytes."""
    data = b""
    while len(data) < size:
        piece = stream.recv(size - len(data))
        if not piece:
            raise TruncatedError(f"connection: ended after {len(data)} of {size} bytes")
        data += piece
    return data


def main() -> None:
    """Connect, and say to whom."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("image")
    parser.add_argument("--dev-root", type=Path)
    options = parser.parse_args()
    roots = AWS_ROOTS
    if options.dev_root:
        roots = (Root.development_from_pem(options.dev_root.read_bytes(), "development root"),)
    try:
        with socket.create_connection((options.host, options.port)) as connection:
            tls, verified = connect(connection, Verifier(roots), options.image)
            with tls:
                print(f"connected to {verified.module_id}, and to nobody in between")
                print(receive(tls, 32).decode())
    except Error as error:
        raise SystemExit(f"refused: {error.message} ({error.code})") from error
    except OSError as error:
        raise SystemExit(f"no connection: {error.strerror or error}") from error


if __name__ == "__main__":
    main()
