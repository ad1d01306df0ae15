# SPDX-License-Identifier: Apache-2.0
"""One enclave of a lab, in a thread of its own, from ENCLAVE_START to its end.

image copied → checked, measured → pages taken from the parent → booted → answered → (running) → ended → all gone

The thread stays until the end: a QEMU is killed by the kernel when the thread that started it goes.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from enclavekit.enclave.run import Plan, plan
from enclavekit.enclave.security_module import security_module
from enclavekit.errors import EifError, Error, NotEnoughMemoryError
from enclavekit.hypervisor.contract import Carrier, Enclave, LaunchSpec, Mode
from enclavekit.hypervisor.memory import new_memory
from enclavekit.lab.console import Console
from enclavekit.lab.donated import Donated, write_image
from enclavekit.lab.slots import Answer
from enclavekit.lab.switch import Switch
from enclavekit.platform.machine import MIB
from enclavekit.virtio.loop import Loop
from enclavekit.virtio.nsm import Nsm


@dataclass(frozen=True, slots=True)
class Host:
    """What all enclaves of a parent have in common.

    ``attestation_directory`` holds the authority that signs their documents; without one they have no NSM. ``role`` and
    ``instance_id`` are the parent's, for PCR3 and PCR4. ``log`` takes sentences, from any thread.
    """

    carrier: Carrier
    switch: Switch
    log: Callable[[str], None]
    attestation_directory: Path | None = None
    role: str | None = None
    instance_id: str | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """What ENCLAVE_START asks for; the memory is in ``donated``."""

    uid: int
    cid: int
    cpus: int
    mode: Mode
    donated: Donated


class LabEnclave:
    """``answer`` is called once. ``on_end``, at its end, says whether that was its own doing, when nothing is left.

    Both come in the enclave's thread.
    """

    def __init__(self, host: Host, order: Order, answer: Answer, on_end: Callable[[bool], None]) -> None:
        self._host = host
        self._order = order
        self._answer = answer
        self._name = f"enclave {order.cid}"
        self._lock = threading.Lock()
        self._stopped = False
        """The parent does not want it any more: its pages are not to be touched."""
        self._running = False
        self._ended_itself = self._by_itself = False
        self._enclave: Enclave | None = None
        self._console: Console | None = None
        self._loop = Loop(self._work, self._end, lambda: on_end(self._by_itself))

    @property
    def cid(self) -> int:
        """Its own, also before it runs."""
        return self._order.cid

    def start(self) -> None:
        """Returns at once. ``RuntimeError`` where there can be no thread: then only ``stop`` is left to do."""
        self._loop.start(self._name)
        self._loop.call(self._boot)

    def stop(self, *, wait: bool = False) -> None:
        """From another thread. One that runs has ended when this returns; one that boots soon does, unless waited for.

        The pages that it was given are not touched any more.
        """
        with self._lock:
            self._stopped = True
        if self._running or wait:
            self._loop.stop()
        else:
            self._loop.call(self._loop.finish)

    # Its thread

    def _boot(self) -> None:
        number, cid = -errno.EIO, 0
        try:
            self._launch()
            number, cid = 0, self._order.cid
        except _Stopped:
            number = -errno.ECANCELED
        except NotEnoughMemoryError as error:
            number = -errno.ENOMEM
            self._refused(error.message)
        except Error as error:
            number = -errno.EINVAL
            self._refused(error.message)
        except OSError as error:
            number = -(error.errno or errno.EIO)
            self._refused(f"{error.strerror or error}".lower())
        finally:
            self._order.donated.close()
            self._answer(number, cid)
            if number:
                self._loop.finish()

    def _refused(self, why: str) -> None:
        self._host.log(f"{self._name} does not start: {why}")

    def _launch(self) -> None:
        order, size = self._order, self._order.donated.size
        with ExitStack() as stack:
            image = stack.enter_context(order.donated.image(lambda: self._stopped))
            self._go_on()
            planned = check_image(image, size, datetime.now(UTC))
            with self._lock:
                self._go_on()
                order.donated.empty()
            memory = new_memory(size)
            stack.callback(os.close, memory)
            write_image(image, memory)
            spec = LaunchSpec(
                enclave_id=f"{order.uid:016x}",
                memory=size,
                cpus=order.cpus,
                image_size=planned.image.size,
                discovery=planned.discovery,
                directory=Path(),  # it has no sockets
                network=self._host.switch,
                memory_fd=memory,
                nsm=self._security_module(planned),
            )
            enclave = self._enclave = self._host.carrier.create(spec)
            for region in enclave.allocate(size):
                enclave.set_user_memory_region(region)
            for _ in range(order.cpus):
                enclave.add_vcpu()
            enclave.start(mode=order.mode, cid=order.cid)
        self._running = True
        self._watch(enclave)
        debug = ", debug mode" if order.mode is Mode.DEBUG else ""
        self._host.log(
            f"{self._name} started: {size // MIB} MiB, {order.cpus} CPUs, PCR0 {planned.pcrs[0].hex()}{debug}"
        )

    def _go_on(self) -> None:
        if self._stopped:
            raise _Stopped

    def _security_module(self, planned: Plan) -> Nsm | None:
        if self._host.attestation_directory is None:
            return None
        return security_module(
            self._host.attestation_directory,
            planned.pcrs,
            enclave_id=f"{self._order.uid:016x}",
            mode=self._order.mode,
            role=self._host.role,
            instance_id=self._host.instance_id,
        )

    def _watch(self, enclave: Enclave) -> None:
        source = enclave.console()
        if source is not None:
            self._console = Console(self._loop, source)
            if self._order.mode is Mode.DEBUG:
                self._host.switch.offer_console(self._order.cid, self._console.attach)
        self._loop.watch(enclave.fileno(), self._on_machine, 0)

    def _on_machine(self, events: int) -> None:
        if events & (select.EPOLLHUP | select.EPOLLERR):
            self._ended_itself = True
            self._loop.finish()

    def _work(self) -> bool:
        return self._console.work() if self._console is not None else False

    def _end(self) -> None:
        self._by_itself = self._ended_itself and not self._stopped
        self._host.switch.withdraw_console(self._order.cid)
        if self._console is not None:
            self._console.close()
        if self._enclave is not None:
            failure = self._enclave.failure() if self._by_itself else None
            if self._running:
                self._loop.forget(self._enclave.fileno())
            self._enclave.close()
            if self._running:
                self._host.log(f"{self._name} ended" + (f": {failure}" if failure else ""))
        if self._loop.error is not None:
            self._host.log(f"{self._name}: {self._loop.error!r}")


class _Stopped(Exception):  # noqa: N818 - not an error
    """The parent does not want it any more."""


def check_image(image: BinaryIO, memory: int, now: datetime) -> Plan:
    """An image checked as real hypervisors do, and measured. ``memory`` is what the enclave has, in bytes.

    Magic, version, structure, CRC, architecture; the signature and the dates of its certificate where it has one; and
    that it fits into the memory. What its kernel needs besides is its own business, as it is on EC2. Errors: those of
    ``plan``.
    """
    planned = plan(image, memory, now, local=False)
    stored = planned.image.header.crc
    if stored != planned.crc:
        raise EifError(f"image checksum: got 0x{stored:08x} in the header, expected 0x{planned.crc:08x}")
    return planned
