# SPDX-License-Identifier: Apache-2.0
"""What every carrier keeps: the same steps, asserted the same, over whatever a ``Subject`` makes.

class TestMine(CarrierContract):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Iterator[Subject]: ...
"""

from __future__ import annotations

import io
import os
import select
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import BinaryIO

import pytest

from enclavekit.errors import EifError, EnclaveConnectionError, Error, LaunchError
from enclavekit.hypervisor.contract import Carrier, Enclave, ImageKind, LaunchSpec, Mode
from enclavekit.hypervisor.launch import launch
from enclavekit.hypervisor.parts import Parts

TIMEOUT_S = 240.0


@dataclass
class Subject:
    """A carrier, what to launch on it, and how an enclave is made to beat, and to end by itself."""

    carrier: Carrier
    spec: LaunchSpec
    image: BinaryIO
    parts: Parts
    beat: Callable[[], object]
    end: Callable[[], object]

    def launch(self, *, mode: Mode = Mode.PRODUCTION, cid: int | None = None) -> Enclave:
        self.image.seek(0)
        return launch(self.carrier.create, self.spec, self.image, mode=mode, cid=cid)


def readable(fd: int, timeout_s: float = TIMEOUT_S) -> bool:
    return bool(select.select([fd], [], [], timeout_s)[0])


def hung_up(enclave: Enclave, timeout_s: float = TIMEOUT_S) -> int:
    """The events that its descriptor polls, within the time."""
    poller = select.poll()
    poller.register(enclave.fileno(), select.POLLIN | select.POLLOUT)
    return dict(poller.poll(int(timeout_s * 1000))).get(enclave.fileno(), 0)


class CarrierContract:
    """Tests of one carrier."""

    def test_an_enclave_lives_and_ends(self, subject: Subject) -> None:
        enclave = subject.launch(mode=Mode.DEBUG)
        try:
            assert hung_up(enclave, 0) == 0
            subject.beat()
            assert readable(enclave.heartbeat_fd())
            assert enclave.statistics().resident > 0
            subject.end()
            assert hung_up(enclave) == select.POLLHUP
            assert hung_up(enclave) == select.POLLHUP, "it stays so"
            assert enclave.failure() is None
        finally:
            enclave.close()

    def test_the_steps_one_by_one(self, subject: Subject) -> None:
        spec = subject.spec
        enclave = subject.carrier.create(spec)
        try:
            assert enclave.image_load_offset(ImageKind.EIF) == 8 << 20
            regions = enclave.allocate(spec.memory)
            assert sum(region.size for region in regions) >= spec.memory
            assert [region.offset for region in regions] == [
                sum(before.size for before in regions[:index]) for index in range(len(regions))
            ]
            regions[0].buffer[:4] = b"test"
            for region in regions:
                enclave.set_user_memory_region(region)
            cpus = [enclave.add_vcpu() for _ in range(spec.cpus)]
            assert len(set(cpus)) == spec.cpus
            assert enclave.start(mode=Mode.PRODUCTION, cid=77) == 77
        finally:
            enclave.close()

    def test_a_start_without_memory_or_cpus(self, subject: Subject) -> None:
        enclave = subject.carrier.create(subject.spec)
        try:
            with pytest.raises(Error) as caught:
                enclave.start(mode=Mode.PRODUCTION)
            assert isinstance(caught.value, LaunchError) or caught.value.code == "ne-no-mem-regions-added"
        finally:
            enclave.close()

    def test_close_gives_everything_back_and_can_be_repeated(self, subject: Subject) -> None:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counts itself both times
        for _ in range(2):
            enclave = subject.launch()
            enclave.close()
            enclave.close()
        assert len(os.listdir("/proc/self/fd")) <= before + 4  # noqa: PTH208 - the simulator releases later

    def test_parts_boot_as_a_file_does(self, subject: Subject) -> None:
        enclave = launch(subject.carrier.create, subject.spec, subject.parts, mode=Mode.PRODUCTION)
        try:
            subject.beat()
            assert readable(enclave.heartbeat_fd())
        finally:
            enclave.close()

    def test_a_wrong_checksum_starts_nothing(self, subject: Subject) -> None:
        subject.image.seek(0)
        data = bytearray(subject.image.read())
        data[-1] ^= 1
        with pytest.raises(EifError, match="image checksum"):
            launch(subject.carrier.create, subject.spec, io.BytesIO(data), mode=Mode.PRODUCTION)

    def test_an_image_that_does_not_fit_starts_nothing(self, subject: Subject) -> None:
        subject.image.seek(0)
        spec = replace(subject.spec, image_size=1 << 40)
        with pytest.raises((EifError, LaunchError)):
            launch(subject.carrier.create, spec, subject.image, mode=Mode.PRODUCTION)

    def test_nobody_listens(self, subject: Subject) -> None:
        enclave = subject.launch()
        try:
            subject.beat()
            assert readable(enclave.heartbeat_fd())
            with pytest.raises(EnclaveConnectionError):
                enclave.connect(4444)
        finally:
            enclave.close()
