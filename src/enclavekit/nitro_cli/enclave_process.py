# SPDX-License-Identifier: Apache-2.0
"""The process that one enclave of ``run-enclave`` has: it runs the image, and answers commands until the end.

Its first words go to the command that started it, as frames of an answer. The enclave is one of ours in every other
way: ``enclave ps`` shows it, ``enclave stop`` ends it.

Source: aws-nitro-enclaves-cli src/enclave_proc/mod.rs.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn

from enclavekit import eif
from enclavekit.enclave.background import detach
from enclavekit.enclave.directory import NAME
from enclavekit.enclave.run import Running, RunOptions
from enclavekit.enclave.run import run as run_image
from enclavekit.enclave.supervisor import Streams
from enclavekit.errors import (
    BootError,
    CertificateError,
    Error,
    FileError,
    FormatError,
    GuestError,
    ImageTooLargeError,
    LaunchError,
    MissingError,
    NotEnoughHugePagesError,
    NotEnoughMemoryError,
    SignatureError,
)
from enclavekit.hypervisor.contract import Carrier, Mode
from enclavekit.hypervisor.nitro import NitroEnclave
from enclavekit.linux.process import allow_many_files
from enclavekit.nitro_cli.codes import Code
from enclavekit.nitro_cli.command import NitroCliError, json_text
from enclavekit.nitro_cli.log import LOG, name_process
from enclavekit.nitro_cli.server import EnclaveServer
from enclavekit.nitro_cli.sockets import SUFFIX
from enclavekit.nitro_cli.wire import DEBUG_FLAG, STATUS_FAILED, frame

INSTANCE_ID = Path("/sys/devices/virtual/dmi/id/board_asset_tag")
NO_INSTANCE = "i-0000000000000000"
STOP_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
TERMINATE_TIMEOUT_S = 30.0

CODES: tuple[tuple[type[Error], Code], ...] = (
    (ImageTooLargeError, Code.MEMORY_OVERFLOW),
    (NotEnoughHugePagesError, Code.INSUFFICIENT_MEMORY),
    (NotEnoughMemoryError, Code.INSUFFICIENT_MEMORY_REQUESTED),
    (CertificateError, Code.SIGNATURE),
    (SignatureError, Code.SIGNATURE),
    (FormatError, Code.EIF_PARSING),
    (BootError, Code.ENCLAVE_BOOT),
    (GuestError, Code.ENCLAVE_BOOT),
    (FileError, Code.FILE_OPERATION),
    (MissingError, Code.FILE_OPERATION),
    (LaunchError, Code.IOCTL),
)
"""What is not here is a carrier's refusal too: E29, as for everything that the driver says no to."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that the process needs: the checks of nitro-cli are behind it."""

    file: BinaryIO
    eif_path: str
    carrier: Carrier
    runtime_directory: Path
    sockets: Path
    name: str
    memory: int
    cpus: tuple[int, ...]
    pinned: bool
    """Whether the CPUs were named."""
    cid: int | None
    debug: bool
    attestation_directory: Path | None = None
    """Of the authority that signs its documents."""


def start_process(prepared: Prepared) -> socket.socket:
    """Start it, and give the socket of its first words. NitroCliError: E04, E05."""
    try:
        ours, theirs = socket.socketpair()
    except OSError as error:
        raise NitroCliError(Code.SOCKET_PAIR, (error.strerror or str(error)).lower()) from error
    try:
        pid = os.fork()
    except OSError as error:
        raise NitroCliError(Code.PROCESS_SPAWN, (error.strerror or str(error)).lower()) from error
    if pid == 0:
        ours.close()
        _main(theirs, prepared)
    theirs.close()
    return ours


def _main(sock: socket.socket, prepared: Prepared) -> NoReturn:
    status = 1
    try:
        detach()
        allow_many_files()
        name_process("enc-xxxxxxx")
        status = EnclaveProcess(sock, prepared, instance_id()).run()
    except BaseException:
        LOG.exception("the enclave's process failed")
    finally:
        os._exit(status)


class EnclaveProcess:
    """One enclave, from here to its end (``server.Answering``)."""

    def __init__(self, sock: socket.socket, prepared: Prepared, instance: str) -> None:
        self._sock: socket.socket | None = sock
        self._prepared = prepared
        self._instance = instance
        self._request_stop: Callable[[], None] | None = None
        self._server: EnclaveServer | None = None
        self._ended = threading.Event()
        self._terminating = False
        self._status = 0
        self._examining: threading.Thread | None = None
        self._examined: eif.Examined | None = None
        self._memory = 0
        self._cpus = prepared.cpus
        self.name = prepared.name
        self.enclave_id = ""
        self.cid = 0
        self.flags = DEBUG_FLAG if prepared.debug else 0

    def run(self) -> int:
        """The process's exit status: 0 when the enclave ended, the code's number when it could not be started."""
        prepared = self._prepared
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        options = RunOptions(
            runtime_directory=prepared.runtime_directory,
            memory=prepared.memory,
            cpus=len(prepared.cpus),
            cid=prepared.cid,
            mode=Mode.DEBUG if prepared.debug else Mode.PRODUCTION,
            name=prepared.name if NAME.fullmatch(prepared.name) else None,
            name_numbered=True,
            image=prepared.eif_path,
            cpu_list=frozenset(prepared.cpus) if prepared.pinned else None,
            attestation_directory=prepared.attestation_directory,
            instance_id=self._instance,
        )
        self._say("Start allocating memory...")
        try:
            run_image(
                prepared.file,
                prepared.carrier,
                options,
                Streams(output=lambda data: None, on_running=self._on_running),
                self._on_started,
            )
        except Error as error:
            failure = failure_of(error, prepared.eif_path)
            LOG.error("%s: %s", failure.code, failure.message)
            if self._sock is not None:
                self._say(failure.text())
                self._answer(frame({"Status": STATUS_FAILED}))
                return failure.code.number
        except KeyboardInterrupt:
            LOG.info("interrupted before the start")
        finally:
            self._ended.set()
            if self._server is not None:
                self._server.close()
        LOG.info("the enclave has ended")
        return self._status

    def _on_started(self, running: Running) -> None:
        self._request_stop = running.request_stop
        if NAME.fullmatch(self.name):
            self.name = running.name
        self.enclave_id = running.module_id or f"{self._instance}-enc{running.enclave_id}"
        self._memory = running.memory
        if isinstance(running.enclave, NitroEnclave):  # the driver knows better what it gave
            self.enclave_id = f"{self._instance}-enc{running.enclave.slot_uid:x}"
            self._cpus, self._memory = tuple(running.enclave.cpus), running.enclave.memory
        name_process(f"enc-{self._slot}")
        self.cid = running.cid
        self._examining = threading.Thread(target=self._examine, daemon=True)
        self._examining.start()
        cpus = ", ".join(map(str, self._cpus))
        self._say(f"Started enclave with enclave-cid: {self.cid}, memory: {self._memory >> 20} MiB, cpu-ids: [{cpus}]")

    def _on_running(self, logs: bool) -> None:
        del logs
        try:
            self._server = EnclaveServer(self._prepared.sockets / f"{self._slot}{SUFFIX}", self)
        except OSError as error:
            raise FileError.of(error, self._prepared.sockets, "listen in") from error
        self._answer(frame({"StdOutMessage": json_text(self._run_info())}) + frame({"Status": 0}))

    @property
    def _slot(self) -> str:
        return self.enclave_id.rpartition("-enc")[2]

    def _run_info(self) -> dict[str, Any]:
        return {
            "EnclaveName": self.name,
            "EnclaveID": self.enclave_id,
            "ProcessID": os.getpid(),
            "EnclaveCID": self.cid,
            "NumberOfCPUs": len(self._cpus),
            "CPUIDs": list(self._cpus),
            "MemoryMiB": self._memory >> 20,
        }

    def _examine(self) -> None:
        """What describe needs takes a while for a large image: begun at once, waited for when it is asked."""
        with open(f"/proc/self/fd/{self._prepared.file.fileno()}", "rb") as file:  # noqa: PTH123 - a position of its own
            self._examined = eif.examine(file, self._prepared.eif_path)

    def describe(self, *, metadata: bool) -> dict[str, Any]:
        """See ``server.Answering``."""
        if self._examining is not None:
            self._examining.join()
        if self._examined is None:
            raise FormatError(f"{self._prepared.eif_path}: cannot be measured any more")
        made = self._run_info() | {
            "State": "TERMINATING" if self._terminating else "RUNNING",
            "Flags": "DEBUG_MODE" if self._prepared.debug else "NONE",
            "Measurements": self._examined.measurements,
        }
        if metadata:
            described = eif.describe_eif_object(self._examined)
            made |= {key: described[key] for key in ("ImageName", "ImageVersion", "Metadata") if key in described}
        return made

    def terminate(self) -> dict[str, Any]:
        """See ``server.Answering``. As with nitro-cli, nothing inside is asked first."""
        self._stop()
        if not self._ended.wait(TERMINATE_TIMEOUT_S):
            raise LaunchError(f"the enclave has not ended within {TERMINATE_TIMEOUT_S:.0f} s")
        return {"EnclaveName": self.name, "EnclaveID": self.enclave_id, "Terminated": True}

    def removed(self) -> None:
        """See ``server.Answering``."""
        self._status = 1
        self._stop()

    def _stop(self) -> None:
        self._terminating = True
        if self._request_stop is not None:
            for _ in range(2):  # once would ask the application, twice ends the machine
                self._request_stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._request_stop is None:
            raise KeyboardInterrupt
        self._stop()

    def _say(self, text: str) -> None:
        LOG.info("%s", text.partition("\n")[0])
        if self._sock is not None:
            _send(self._sock, frame({"StdErrMessage": text}))

    def _answer(self, data: bytes) -> None:
        """The last word to the command that started us."""
        if self._sock is not None:
            _send(self._sock, data)
            self._sock.close()
            self._sock = None


def failure_of(error: Error, eif_path: str) -> NitroCliError:
    """An error of ours as nitro-cli's."""
    code = next((code for kind, code in CODES if isinstance(error, kind)), Code.IOCTL)
    message = f"{error.message}{f' ({error.hint})' if error.hint else ''}"
    if code in (Code.EIF_PARSING, Code.SIGNATURE):
        message = f"{eif_path}: {message}"
    made = NitroCliError(code, message)
    made.__cause__ = error
    return made


def instance_id(path: Path = INSTANCE_ID) -> str:
    """What EC2 calls this machine; zeros anywhere else."""
    try:
        found = "".join(path.read_text().split())
    except (OSError, ValueError):
        return NO_INSTANCE
    return found if re.fullmatch(r"i-[0-9a-f]{8,17}", found) else NO_INSTANCE


def _send(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
    except OSError:  # whoever started us has gone: the enclave runs all the same
        LOG.warning("nobody takes our first words")
