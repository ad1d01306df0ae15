# SPDX-License-Identifier: Apache-2.0
"""The console of an enclave: what its serial line says, for any number of readers, none of whom can hold it up.

What was said last is kept, so that a reader who comes late sees how it booted; whether real hypervisors keep as much is
not public. A reader who is slower than what is kept misses something. It is read-only.
"""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress
from functools import partial

from enclavekit.virtio.loop import Loop

KEPT = 256 * 1024
"""Bytes."""
READ_SIZE = 64 * 1024
MAX_READERS = 16
LAST_READS = 64
"""What is read once the machine has ended."""


class Console:
    """Reads ``source``, non-blocking, from now on, in the loop's thread; its readers' sockets are its own."""

    def __init__(self, loop: Loop, source: int) -> None:
        self._loop = loop
        self._source = source
        self._readable = True
        self._kept = bytearray()
        self._kept_from = 0
        """How much was said before what is kept."""
        self._readers: dict[socket.socket, int] = {}
        """With what each has been sent."""
        loop.watch(source, self._on_source)

    def attach(self, reader: socket.socket) -> None:
        """From any thread: one more reader. It hangs up on one too many."""
        reader.setblocking(False)
        if not self._loop.call(partial(self._add, reader)):
            reader.close()

    def work(self) -> bool:
        """Carry something; True when there may be more."""
        if self._readable:
            self._readable = self._read()
        return self._readable

    def close(self) -> None:
        """The machine has ended: carry what it said last, hang up on all."""
        for _ in range(LAST_READS):
            if not self._read():
                break
        self._loop.forget(self._source)
        for reader in self._readers:
            self._loop.retire(reader)
        self._readers.clear()

    def _on_source(self, events: int) -> None:
        del events
        self._readable = True

    def _read(self) -> bool:
        try:
            data = os.read(self._source, READ_SIZE)
        except OSError:  # nothing now, or never again
            return False
        if not data:
            return False
        self._kept += data
        if len(self._kept) > KEPT:
            self._kept_from += len(self._kept) - KEPT
            del self._kept[:-KEPT]
        for reader in list(self._readers):
            self._send(reader)
        return True

    def _add(self, reader: socket.socket) -> None:
        if len(self._readers) >= MAX_READERS:
            reader.close()
            return
        with suppress(OSError):  # gone already: sending will tell
            reader.shutdown(socket.SHUT_RD)  # nobody writes to a console
        self._readers[reader] = 0
        self._loop.watch(reader.fileno(), partial(self._on_reader, reader), select.EPOLLOUT)
        self._send(reader)

    def _on_reader(self, reader: socket.socket, events: int) -> None:
        if events & (select.EPOLLHUP | select.EPOLLERR):
            self._drop(reader)
        elif reader in self._readers:
            self._send(reader)

    def _send(self, reader: socket.socket) -> None:
        position = max(self._readers[reader], self._kept_from)
        try:
            while position < self._kept_from + len(self._kept):
                with memoryview(self._kept) as view:
                    position += reader.send(view[position - self._kept_from :])
        except BlockingIOError:
            pass
        except OSError:
            self._drop(reader)
            return
        self._readers[reader] = position

    def _drop(self, reader: socket.socket) -> None:
        if self._readers.pop(reader, None) is not None:
            self._loop.retire(reader)
