# SPDX-License-Identifier: Apache-2.0
"""The example in examples/tls-binding: its client talks to the enclave, and refuses a relay that shows its document."""

from __future__ import annotations

import socket
import ssl
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from eif_images import image
from made_documents import PCRS, certificates, document, links, root_of

from enclavekit.attest import Policy, Verifier
from enclavekit.errors import AttestationError

sys.path.insert(0, str(Path(__file__).parents[3] / "examples/tls-binding"))

import demo
from client import connect, receive
from server import GREETING, Enclave

NOW = datetime.now(UTC).replace(microsecond=0)
CHAIN = certificates([replace(one, first=NOW - timedelta(hours=1), last=NOW + timedelta(hours=2)) for one in links()])


@pytest.fixture
def app(tmp_path: Path) -> str:
    path = tmp_path / "app.eif"
    path.write_bytes(image())
    return str(path)


def enclave_of(app: str, **pcrs: bytes) -> Enclave:
    """Documents as its NSM would sign them."""
    measured = PCRS | dict(Policy.from_eif(app).accepted[0])
    now = int(NOW.timestamp() * 1000)
    return Enclave(lambda nonce, data: document(CHAIN, nonce=nonce, user_data=data, pcrs=measured, timestamp=now))


@contextmanager
def serving(enclave: Enclave) -> Iterator[socket.socket]:
    """A connection to it; whatever it does happens in a thread."""
    near, far = socket.socketpair()
    with ThreadPoolExecutor(1) as pool, near, far:
        work: Future[None] = pool.submit(enclave.serve, far)
        yield near
        near.close()
        with suppress(OSError):
            work.result()


def test_the_client_talks_to_the_enclave(app: str) -> None:
    with serving(enclave_of(app)) as connection:
        tls, verified = connect(connection, Verifier([root_of(CHAIN)]), app)
        assert verified.user_data is not None
        assert receive(tls, len(GREETING)) == GREETING
        tls.close()


def test_the_client_refuses_a_relayed_document(app: str) -> None:
    """A parent with a key of its own asks the enclave with the client's nonce, and hands the genuine document on."""
    genuine = enclave_of(app)

    def ask(nonce: bytes, _: bytes) -> bytes:
        with serving(genuine) as connection:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with context.wrap_socket(connection) as tls:
                tls.sendall(nonce)
                relayed: bytes = receive(tls, int.from_bytes(receive(tls, 2), "big"))
                receive(tls, len(GREETING))
                return relayed

    with serving(Enclave(ask)) as connection, pytest.raises(AttestationError) as caught:
        connect(connection, Verifier([root_of(CHAIN)]), app)
    assert caught.value.code == "user-data-mismatch"


def test_the_client_refuses_a_document_that_is_replayed(app: str) -> None:
    genuine = enclave_of(app)
    genuine._attest = lambda nonce, data, attest=genuine._attest: attest(bytes(32), data)
    with serving(genuine) as connection, pytest.raises(AttestationError) as caught:
        connect(connection, Verifier([root_of(CHAIN)]), app)
    assert caught.value.code == "nonce-mismatch"


def test_the_client_refuses_another_image_and_another_root(app: str, tmp_path: Path) -> None:
    other = tmp_path / "other.eif"
    other.write_bytes(image("kcm012"))
    for verifier, name, code in (
        (Verifier([root_of(CHAIN)]), str(other), "pcr-mismatch"),
        (Verifier(), app, "untrusted-root"),
    ):
        with serving(enclave_of(app)) as connection, pytest.raises(AttestationError) as caught:
            connect(connection, verifier, name)
        assert caught.value.code == code


def test_the_demo_shows_both(app: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", app])
    demo.main()
    direct, relayed = capsys.readouterr().out.splitlines()
    assert direct.startswith("the enclave: connected to i-00000000000000000-enc")
    assert direct.endswith(": hello from inside an enclave")
    assert relayed.startswith("a relay: refused: policy: user_data is 32 bytes, ")
    assert relayed.endswith(" (user-data-mismatch)")
