# SPDX-License-Identifier: Apache-2.0
"""The job of running an image over carrier ``nitro``, its ioctls answered by the simulator."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kernel_files import bzimage

from enclavekit import eif
from enclavekit.eif import Arch, BytesContent, Section, SectionType
from enclavekit.enclave.directory import ended
from enclavekit.enclave.run import Running, RunOptions, run
from enclavekit.enclave.supervisor import Streams
from enclavekit.errors import GuestError, LaunchError
from enclavekit.hypervisor.contract import LaunchSpec
from enclavekit.hypervisor.nitro import HugePages, NitroCarrier, NitroEnclave
from enclavekit.linux.nitro_enclaves import create_vm
from enclavekit.testing.nitro_device import SimulatedDevice
from enclavekit.testing.nitro_driver import SimulatedDriver, State
from enclavekit.testing.simulated import SIZES, UnixVsock, map_aligned


@dataclass
class Parent:
    driver: SimulatedDriver
    vsock: UnixVsock
    carrier: NitroCarrier
    heard: threading.Event = field(default_factory=threading.Event)

    def run(self, image: Path, options: RunOptions, on_started: Callable[[Running], None]) -> None:
        """Until it has ended: without our init in it, that is all that is known."""
        with image.open("rb") as file:
            streams = Streams(output=lambda data: None, on_running=lambda logs: self.heard.set())
            run(file, self.carrier, options, streams, on_started)


@pytest.fixture
def parent(tmp_path: Path) -> Parent:
    driver = SimulatedDriver()
    vsock = UnixVsock(tmp_path)
    device = SimulatedDevice(driver)
    return Parent(
        driver, vsock, NitroCarrier(device, HugePages(lambda: SIZES, map_aligned), vsock, tmp_path / "heartbeat.lock")
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    parts = [
        (SectionType.KERNEL, bzimage(b"payload")),
        (SectionType.CMDLINE, b"quiet"),
        (SectionType.METADATA, b"{}"),
        (SectionType.RAMDISK, b""),
    ]
    out = io.BytesIO()
    eif.write(out, [Section(kind, BytesContent(data)) for kind, data in parts], arch=Arch.X86_64)
    path = tmp_path / "image.eif"
    path.write_bytes(out.getvalue())
    return path


def beat_and_end(parent: Parent) -> threading.Thread:
    """What the enclave does."""

    def live() -> None:
        parent.vsock.beat()
        parent.heard.wait(60)
        parent.driver.slots[-1].end()

    thread = threading.Thread(target=live)
    thread.start()
    return thread


def test_the_driver_says_which_cid(parent: Parent, image: Path, tmp_path: Path) -> None:
    """Another program's enclave may have the one that we would take."""
    other, _ = create_vm(parent.carrier.device)
    parent.driver.slots[-1].state, parent.driver.slots[-1].cid = State.RUNNING, 16
    started: list[Running] = []
    threads: list[threading.Thread] = []

    def on_started(running: Running) -> None:
        started.append(running)
        threads.append(beat_and_end(parent))

    with pytest.raises(GuestError, match="without the application's status"):
        parent.run(image, RunOptions(tmp_path / "run", cpus=2), on_started)
    threads[0].join()
    assert [running.cid for running in started] == [17]
    (state,) = ended(tmp_path / "run")
    assert (state["cid"], state["memory"]) == (17, 64 << 20)
    os.close(other)


def test_a_cid_that_was_asked_for(parent: Parent, image: Path, tmp_path: Path) -> None:
    threads: list[threading.Thread] = []
    cids: list[int] = []

    def on_started(running: Running) -> None:
        cids.append(running.cid)
        threads.append(beat_and_end(parent))

    with pytest.raises(GuestError):
        parent.run(image, RunOptions(tmp_path / "run", cpus=2, cid=40), on_started)
    threads[0].join()
    assert cids == [40]


def test_an_image_that_changes_meanwhile_is_not_run(parent: Parent, image: Path, tmp_path: Path) -> None:
    class Changing(NitroCarrier):
        def create(self, spec: LaunchSpec) -> NitroEnclave:
            image.write_bytes(image.read_bytes())
            return super().create(spec)

    parent.carrier = Changing(parent.carrier.device, parent.carrier.pages, parent.vsock, parent.carrier.lock)
    with pytest.raises(LaunchError) as caught:
        parent.run(image, RunOptions(tmp_path / "run", cpus=2), lambda running: pytest.fail("it ran"))
    assert str(caught.value) == "image: it changed while it was being read"
    assert ended(tmp_path / "run") == []
