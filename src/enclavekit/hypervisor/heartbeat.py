# SPDX-License-Identifier: Apache-2.0
"""The heartbeat of a real enclave: its init dials the parent's port 9000, says 0xB7 and hears it again.

Only one process can listen there, so launches queue for it: each holds a lock from before its start until it was
answered. nitro-cli knows nothing of the lock; while it has the port, we try again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import selectors
import socket
import threading
import time
from pathlib import Path

from enclavekit.errors import CarrierError, FileError
from enclavekit.linux.parent_vsock import ParentVsock

HEARTBEAT_PORT = 9000
HEARTBEAT = b"\xb7"
GIB = 1 << 30
RETRY_S = 0.2


def heartbeat_timeout_s(image_size: int, memory: int) -> float:
    """How long to wait, for sizes in bytes: 90 s for each 6 GiB of image, and 90 s for each 100 GiB of memory.

    Source: aws-nitro-enclaves-cli src/enclave_proc/resource_manager.rs.
    """
    return 90.0 * (1 + max(image_size - 1, 0) // (6 * GIB)) + 90.0 * (1 + max(memory - 1, 0) // (100 * GIB))


class HeartbeatPort:
    """The parent's port 9000, ours until an enclave has been answered or this is closed.

    ``lock`` is a file that every launch of this machine locks. ``fileno`` polls readable once init was answered.
    """

    def __init__(self, vsock: ParentVsock, lock: Path, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._beat = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = -1
        try:
            self._lock = self._take_lock(lock)
            self._listener = self._listen(vsock)
        except BaseException:
            self._release()
            os.close(self._beat)
            os.close(self._stop)
            raise
        self._thread = threading.Thread(target=self._serve, name="heartbeat", daemon=True)
        self._thread.start()

    def _take_lock(self, path: Path) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            try:
                fd = os.open(path, flags)
            except FileNotFoundError:
                fd = os.open(path, flags | os.O_CREAT, 0o644)
        except OSError as error:
            raise FileError.of(error, path, "open") from error
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > self._deadline:
                    os.close(fd)
                    raise self._busy() from None
                time.sleep(RETRY_S)
            else:
                return fd

    def _listen(self, vsock: ParentVsock) -> socket.socket:
        while True:
            try:
                return vsock.listen(HEARTBEAT_PORT)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise CarrierError(
                        f"vsock port {HEARTBEAT_PORT}: {(error.strerror or str(error)).lower()}"
                    ) from error
                if time.monotonic() > self._deadline:
                    raise self._busy() from error
            time.sleep(RETRY_S)

    @staticmethod
    def _busy() -> CarrierError:
        return CarrierError(
            f"vsock port {HEARTBEAT_PORT}: taken, and not given back",
            hint="another enclave is being started and does not come up",
        )

    def fileno(self) -> int:
        """An eventfd."""
        return self._beat

    def _serve(self) -> None:
        """Until one has said the right byte; the supervisor, not we, knows when it is too late."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stop, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                if any(key.fd == self._stop for key, _ in selector.select()):
                    return
                with contextlib.suppress(OSError):
                    connection, _ = self._listener.accept()
                    with connection:
                        connection.settimeout(5.0)
                        if connection.recv(1) == HEARTBEAT:
                            connection.sendall(HEARTBEAT)
                            break
        self._release()  # before anybody is told: the next launch can begin
        os.eventfd_write(self._beat, 1)

    def _release(self) -> None:
        listener: socket.socket | None = getattr(self, "_listener", None)
        if listener is not None:
            listener.close()
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def close(self) -> None:
        """Listen no more. Once."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._release()
        os.close(self._beat)
        os.close(self._stop)
