# SPDX-License-Identifier: Apache-2.0
"""The few words of QMP that are spoken, against the other end of a socket pair."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from enclavekit.hypervisor.qmp import Qmp


@pytest.fixture
def pair() -> Iterator[tuple[Qmp, socket.socket]]:
    ours, theirs = socket.socketpair()
    qmp = Qmp(ours)
    yield qmp, theirs
    qmp.close()
    theirs.close()


def test_it_negotiates_and_quits(pair: tuple[Qmp, socket.socket]) -> None:
    qmp, qemu = pair
    qmp.quit()
    said = [json.loads(line) for line in qemu.recv(4096).splitlines()]
    assert said == [{"execute": "qmp_capabilities"}, {"execute": "quit"}]


def test_the_shutdowns_reason_is_kept_however_it_is_cut(pair: tuple[Qmp, socket.socket]) -> None:
    qmp, qemu = pair
    line = b'{"QMP": {}}\n{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}\n'
    for number in range(0, len(line), 7):
        qemu.send(line[number : number + 7])
        qmp.read()
    assert qmp.shutdown_reason == "guest-reset"


def test_nonsense_is_skipped(pair: tuple[Qmp, socket.socket]) -> None:
    qmp, qemu = pair
    qemu.send(b'no json\n[1]\n{"event": 3}\n' + b"x" * 1000 + b"\n")
    qmp.read()
    assert qmp.shutdown_reason is None


def test_a_peer_that_is_gone_is_no_error(pair: tuple[Qmp, socket.socket]) -> None:
    qmp, qemu = pair
    qemu.close()
    qmp.read()
    qmp.quit()
    assert qmp.shutdown_reason is None
