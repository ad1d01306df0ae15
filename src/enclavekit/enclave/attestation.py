# SPDX-License-Identifier: Apache-2.0
"""Requests for attestation documents: from whoever asks to init and back, one at a time, as init wants it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from enclavekit.codec.init_frames import Attest, AttestationDocument, Frame

MAX_WAITING = 64
TAG_END = 1 << 32

Reply = Callable[[dict[str, Any]], None]


class Attestation:
    """``send`` gives init a frame. Each reply is called once: with ``document``, in hexadecimal, or ``error``."""

    def __init__(self, send: Callable[[Frame], None]) -> None:
        self._send = send
        self._answers: bool | None = None
        """Whether the image's init does; None before it has said so, or when it has gone."""
        self._waiting: deque[tuple[bytes, Reply]] = deque()
        self._asked: Reply | None = None
        self._tag = 0

    def greet(self, *, attests: bool) -> None:
        """Init is there, and has said whether it answers."""
        self._answers = attests

    def ask(self, nonce: bytes, reply: Reply) -> None:
        """Ask for a document now, or after those that were asked for before."""
        if self._answers is None:
            reply({"error": "its init does not answer: it is still booting, has ended, or is not enclavekit's"})
        elif not self._answers:
            reply({"error": "its image does not let the host ask for documents, which build --attest does"})
        elif len(self._waiting) >= MAX_WAITING:
            reply({"error": f"{MAX_WAITING} requests for documents wait already"})
        else:
            self._waiting.append((nonce, reply))
            self._next()

    def take(self, answer: AttestationDocument) -> None:
        """Init's answer; one that nobody waits for is dropped."""
        if self._asked is None or answer.tag != self._tag:
            return
        reply, self._asked = self._asked, None
        if answer.document is None:
            reply({"error": f"no document: {answer.message}"})
        else:
            reply({"document": answer.document.hex()})
        self._next()

    def end(self) -> None:
        """Init has gone."""
        self._answers = None
        replies = [reply for reply in (self._asked, *(reply for _, reply in self._waiting)) if reply is not None]
        self._asked = None
        self._waiting.clear()
        for reply in replies:
            reply({"error": "it has ended"})

    def _next(self) -> None:
        if self._asked is None and self._waiting:
            nonce, self._asked = self._waiting.popleft()
            self._tag = (self._tag + 1) % TAG_END
            self._send(Attest(self._tag, nonce))
