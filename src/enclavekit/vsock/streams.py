# SPDX-License-Identifier: Apache-2.0
"""The same for asyncio: streams, as ``asyncio.open_connection`` and ``asyncio.start_server`` give them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from enclavekit.vsock.sockets import BACKLOG, TIMEOUT_S, Caller, caller_of, connect, listen

LIMIT = 1 << 16
"""Bytes of a line, as asyncio's own default."""

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Caller], Awaitable[None]]


async def open_connection(
    enclave: str | int, port: int, *, timeout_s: float | None = TIMEOUT_S, runtime: Path | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As ``connect``; the connection is made in a thread, so nothing else waits for it."""
    sock = await asyncio.to_thread(lambda: connect(enclave, port, timeout_s=timeout_s, runtime=runtime))
    return await asyncio.open_connection(sock=sock, limit=LIMIT)


@contextlib.asynccontextmanager
async def start_server(
    handler: Handler, port: int, *, backlog: int = BACKLOG, runtime: Path | None = None
) -> AsyncIterator[asyncio.Server]:
    """As ``listen``: a server for the block's time, whose handler also gets who dialled."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer, caller_of(writer.get_extra_info("peername")))
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    with listen(port, backlog=backlog, runtime=runtime) as listener:
        listener.socket.setblocking(False)
        server = await asyncio.start_server(handle, sock=listener.socket, limit=LIMIT)
        async with server:
            yield server
