# SPDX-License-Identifier: Apache-2.0
"""Words for ports."""

from __future__ import annotations

from pathlib import Path

import pytest

from enclavekit.cli.ports import parse_listen, parse_publish
from enclavekit.errors import UsageError
from enclavekit.virtio.host_sockets import HostAddress


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8080:80", (HostAddress(None, "127.0.0.1", 8080), 80)),
        ("10.1.2.3:1:4294967294", (HostAddress(None, "10.1.2.3", 1), 4294967294)),
        ("[::1]:8080:80", (HostAddress(None, "::1", 8080), 80)),
    ],
)
def test_publish(text: str, expected: tuple[HostAddress, int]) -> None:
    assert parse_publish(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5000=unix:/run/a.sock", (5000, HostAddress(Path("/run/a.sock")))),
        ("5000=tcp:10.0.0.1:80", (5000, HostAddress(None, "10.0.0.1", 80))),
        ("5000=tcp:80", (5000, HostAddress(None, "127.0.0.1", 80))),
        ("5000=tcp:[::1]:80", (5000, HostAddress(None, "::1", 80))),
    ],
)
def test_listen(text: str, expected: tuple[int, HostAddress]) -> None:
    assert parse_listen(text) == expected
    assert parse_listen("1=unix:a")[1].path == Path.cwd() / "a"


@pytest.mark.parametrize(
    "text", ["", "80", ":80", "80:", "a:80", "65536:80", "80:4294967295", "x:1:2", "-1:80", "²:80"]
)
def test_no_publish(text: str) -> None:
    with pytest.raises(UsageError):
        parse_publish(text)


@pytest.mark.parametrize(
    "text", ["", "5000", "5000=", "5000=unix:", "x=unix:/a", "1=udp:a:1", "1=tcp:", "1=tcp:host:80"]
)
def test_no_listen(text: str) -> None:
    with pytest.raises(UsageError):
        parse_listen(text)
