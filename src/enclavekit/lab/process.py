# SPDX-License-Identifier: Apache-2.0
"""The process of a lab: the parent machine, and what it needs of us, until one of them ends or somebody says so.

In threads: the NE device, the vsock devices, enclaves that start. In the main one: the parent's console, whoever has a
command for the parent (``agent.sock``, each gets a connection to the agent), and ``control.sock``.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enclavekit.enclave.control import ControlServer
from enclavekit.enclave.log_file import LogFile
from enclavekit.errors import EnclaveConnectionError, Error, FileError, LabError
from enclavekit.hypervisor.accel import Accel
from enclavekit.hypervisor.contract import Carrier
from enclavekit.lab.directory import AGENT, CONSOLE, DEVICE, LOG, LabDirectory
from enclavekit.lab.enclave import Host
from enclavekit.lab.hypervisor import LabHypervisor
from enclavekit.lab.ne_server import NeServer
from enclavekit.lab.ne_slots import Limits
from enclavekit.lab.parent import AGENT_PORT, Parent, ParentOptions
from enclavekit.lab.switch import Switch
from enclavekit.runtime.find import Kernel, Qemu
from enclavekit.virtio.host_sockets import socket_path

RETRY_S = 0.1
CONNECT_TIMEOUT_S = 10.0
BACKLOG = 64
READ_SIZE = 1 << 16
LAST_WORDS = 1024
"""Bytes of the console, for when the parent does not come up."""
NO_AGENT = b"-"
"""Sent instead of a connection."""


@dataclass(frozen=True, slots=True)
class LabOptions:
    """What a lab is made of."""

    qemu: Qemu
    kernel: Kernel
    accel: Accel
    ramdisks: list[Path]
    """The parent's root file system."""
    parent: ParentOptions
    carrier: Carrier
    """Of the enclaves."""
    attestation_directory: Path
    """Of the authority that signs their documents."""
    role: str | None = None
    """The parent's, for PCR3."""
    boot_timeout_s: float = 120.0


class Lab:
    """One lab in this process, which owns the directory from now on. ``run`` returns when it has ended."""

    def __init__(self, directory: LabDirectory, options: LabOptions) -> None:
        self._directory, self._options = directory, options
        self._selector = selectors.DefaultSelector()
        self._cleanup = ExitStack()
        self._control: ControlServer | None = None
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ended_lock = threading.RLock()  # signal handlers stop it too
        self._reason = ""
        self._not_found = f"no sign of life within {options.boot_timeout_s:.0f} s"
        self._started = time.time()
        self._console = LogFile(directory.path / CONSOLE)
        self._said = b""
        self._log = LogFile(directory.path / LOG)
        self._log_lock = threading.Lock()

    def run(self, on_up: Callable[[dict[str, Any]], None]) -> None:
        """From start to end; ``on_up`` gets the state as soon as the parent takes commands. Nothing is left of it.

        Errors: LabError when it does not come up, CarrierError, FileError.
        """
        try:
            with self._cleanup:
                self._start()
                self._wait_for_agent()
                state = self._state()
                self._directory.write_state(state)
                self.log(f"the parent is up after {time.time() - self._started:.1f} s")
                on_up(state)
                self._serve()
        finally:
            self._console.close()
            self._log.close()
            with self._ended_lock:
                ended, self._ended = self._ended, -1
                os.close(ended)
            self._directory.remove()
            if self._control is not None:
                self._control.end({"state": "ended", "reason": self._reason})

    def stop(self, reason: str = "stopped") -> None:
        """From any thread."""
        self._reason = self._reason or reason
        with self._ended_lock:
            if self._ended >= 0:
                os.eventfd_write(self._ended, 1)

    def log(self, line: str) -> None:
        """A line for people, from any thread."""
        with self._log_lock:
            self._log.write(f"{time.time() - self._started:9.3f} {line}\n".encode())

    def _start(self) -> None:
        self._switch = Switch()
        self._parent = Parent(self._options.qemu, self._options.kernel, self._options.accel, self._options.parent)
        self._cleanup.callback(self._selector.close)
        with ExitStack() as given:
            vsock, vsock_qemu = socket.socketpair()
            given.callback(vsock_qemu.close)
            self._switch.start_parent(vsock, lambda: self.stop("the vsock device has ended"))
            self._cleanup.callback(self._switch.close)
            hypervisor = LabHypervisor(self._host(), self._enclave_ended)
            self._cleanup.callback(hypervisor.close)
            self._server = NeServer(
                self._listen(DEVICE),
                hypervisor,
                limits=Limits(cpus=self._options.parent.cpus),
                on_gone=lambda: self.stop("the device has ended"),
            )
            self._cleanup.callback(self._server.close)
            self._server.start()
            console, console_qemu = socket.socketpair()
            given.callback(console_qemu.close)
            self._cleanup.callback(console.close)
            console.setblocking(False)
            self._cleanup.callback(self._parent.close)
            device = (self._directory.path / DEVICE).absolute()
            self._parent.start(self._options.ramdisks, device=device, vsock=vsock_qemu, console=console_qemu)
        self._selector.register(console, selectors.EVENT_READ, lambda: self._read_console(console))
        self._selector.register(self._parent, selectors.EVENT_READ, lambda: self.stop("the parent has ended"))
        self._selector.register(self._ended, selectors.EVENT_READ, lambda: None)
        agent = self._listen(AGENT)
        self._cleanup.callback(agent.close)
        self._selector.register(agent, selectors.EVENT_READ, lambda: self._accept(agent))
        self._control = ControlServer(
            self._selector, self._directory.path, status=self._state, stop=lambda grace_s: self.stop()
        )

    def _enclave_ended(self, uid: int) -> None:
        self._server.ended(uid)

    def _host(self) -> Host:
        options = self._options
        return Host(
            carrier=options.carrier,
            switch=self._switch,
            log=self.log,
            attestation_directory=options.attestation_directory,
            role=options.role,
            instance_id=options.parent.instance_id,
        )

    def _listen(self, name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        path = self._directory.path / name
        try:
            with socket_path(path.parent, name) as short:
                listener.bind(short)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise FileError.of(error, path, "listen on") from error
        return listener

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it went again, or there are no files: it comes again
            client, _ = listener.accept()
            threading.Thread(target=self._hand_over, args=(client,), daemon=True).start()

    def _hand_over(self, client: socket.socket) -> None:
        """A connection to the agent, as a descriptor; the directory is this user's, so whoever connects is."""
        with client, contextlib.suppress(OSError):
            try:
                agent = self._switch.connect(AGENT_PORT, CONNECT_TIMEOUT_S)
            except Error as error:
                client.sendall(NO_AGENT + error.message.encode())
                return
            with agent:
                socket.send_fds(client, [b"+"], [agent.fileno()])

    def _wait_for_agent(self) -> None:
        """The machine boots; its console is read meanwhile."""
        deadline = time.monotonic() + self._options.boot_timeout_s
        looked = threading.Event()

        def look() -> None:
            try:
                self._look_for_agent(deadline)
            finally:
                looked.set()
                os.eventfd_write(self._ended, 1)

        looking = threading.Thread(target=look, name="agent", daemon=True)
        looking.start()
        try:
            while not looked.is_set():
                self._turn()
        finally:
            looked.set()
            self._reason = self._reason or self._not_found
            looking.join()
        if self._reason:
            raise LabError(f"the parent did not come up: {self._failure()}{self._last_words()}")

    def _look_for_agent(self, deadline: float) -> None:
        while not self._reason and time.monotonic() < deadline:
            try:
                self._switch.connect(AGENT_PORT, RETRY_S).close()
            except EnclaveConnectionError:
                time.sleep(RETRY_S)
            else:
                self._not_found = ""
                return

    def _serve(self) -> None:
        while not self._reason:
            self._turn()
        failure = self._failure()
        self.log(f"the lab ends: {failure}")

    def _failure(self) -> str:
        errors = (self._parent.failure(), self._switch.error, self._server.error)
        return next((str(error) for error in errors if error is not None), self._reason)

    def _last_words(self) -> str:
        lines = self._said.decode(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"; its last words: {''.join(c for c in last if c.isprintable())[:200]}" if last else ""

    def _turn(self) -> None:
        for key, _ in self._selector.select():
            key.data()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._ended)

    def _read_console(self, console: socket.socket) -> None:
        try:
            data = console.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(console)
        self._console.write(data)
        self._said = (self._said + data)[-LAST_WORDS:]

    def _state(self) -> dict[str, Any]:
        options = self._options.parent
        return {
            "name": self._directory.path.name,
            "pid": os.getpid(),
            "qemu_pid": self._parent.pid,
            "instance_id": options.instance_id,
            "cpus": options.cpus,
            "memory": options.memory,
            "enclave_memory": options.enclave_memory,
            "started": self._started,
        }


def connect_agent(directory: Path) -> socket.socket:
    """A connection to the agent of the lab in this directory, for one command. Errors: LabError, FileError."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(2 * CONNECT_TIMEOUT_S)
        try:
            with socket_path(directory, AGENT) as path:
                client.connect(path)
            said, fds, _, _ = socket.recv_fds(client, 1 << 12, 1)
        except TimeoutError:
            raise LabError(f"lab {directory.name}: no answer") from None
        except OSError as error:
            raise FileError.of(error, directory / AGENT, "speak with") from error
    if not fds:
        raise LabError(f"lab {directory.name}: {said[1:].decode(errors='replace') or 'has ended'}")
    return socket.socket(fileno=fds[0])
