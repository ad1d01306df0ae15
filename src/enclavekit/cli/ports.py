# SPDX-License-Identifier: Apache-2.0
"""Words for ports: ``8080:80``, ``127.0.0.1:8080:80``, ``5000=unix:/run/a.sock``, ``5000=tcp:127.0.0.1:80``."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from enclavekit.errors import UsageError
from enclavekit.virtio.host_sockets import MAX_PORT, HostAddress

MAX_TCP_PORT = 65535
LOOPBACK = "127.0.0.1"


def parse_publish(text: str) -> tuple[HostAddress, int]:
    """Where to listen, and the enclave's port. Without an address, on this machine only."""
    head, _, port = text.rpartition(":")
    host, colon, tcp = head.rpartition(":")
    if not head or not port:
        raise UsageError(f"--publish {text!r}: expected [ADDR:]PORT:VSOCK", hint="for example 8080:80")
    return HostAddress(None, _host(host if colon else LOOPBACK, text), _number(tcp, MAX_TCP_PORT, text)), _number(
        port, MAX_PORT, text
    )


def parse_listen(text: str) -> tuple[int, HostAddress]:
    """The port that the enclave dials, and where that leads."""
    port, _, target = text.partition("=")
    kind, _, rest = target.partition(":")
    if kind == "unix" and rest:
        return _number(port, MAX_PORT, text), HostAddress(Path(rest).absolute())
    host, _, tcp = rest.rpartition(":")
    if kind != "tcp" or not tcp:
        raise UsageError(f"--listen {text!r}: expected VSOCK=unix:PATH or VSOCK=tcp:ADDR:PORT")
    return _number(port, MAX_PORT, text), HostAddress(
        None, _host(host or LOOPBACK, text), _number(tcp, MAX_TCP_PORT, text)
    )


def _host(text: str, where: str) -> str:
    try:
        return str(ipaddress.ip_address(text.strip("[]")))
    except ValueError as error:
        raise UsageError(f"{where!r}: {text!r} is no IP address") from error


def _number(text: str, most: int, where: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > most:
        raise UsageError(f"{where!r}: {text!r}, expected a port from 0 to {most}")
    return int(text)
