# SPDX-License-Identifier: Apache-2.0
"""The basic flow of an enclave, step by step: memory and CPUs are given away, an image boots in them.

python basic_flow.py app.eif              on an EC2 instance with enclave support
python basic_flow.py app.eif --simulated  anywhere: the driver's rules are checked, and nothing runs
"""

from __future__ import annotations

import select
import sys
import tempfile
from pathlib import Path

from enclavekit import eif
from enclavekit.hypervisor.contract import Carrier, ImageKind, LaunchSpec, Mode
from enclavekit.hypervisor.launch import write_image
from enclavekit.hypervisor.nitro import NitroCarrier
from enclavekit.testing.simulated import SimulatedCarrier

MEMORY = 512 << 20


def run(carrier: Carrier, path: Path, directory: Path, simulated: SimulatedCarrier | None) -> None:
    """Run the image at ``path`` to its end."""
    with path.open("rb") as image:
        size = eif.read(image).size
        spec = LaunchSpec("00000001", MEMORY, 2, size, eif.Discovery.CMDLINE, directory)
        enclave = carrier.create(spec)  # NE_CREATE_VM
        try:
            offset = enclave.image_load_offset(ImageKind.EIF)  # NE_GET_IMAGE_LOAD_INFO: 8 MiB
            regions = enclave.allocate(MEMORY)  # huge pages
            image.seek(0)
            write_image(image, size, regions, offset)  # before they are given away
            for region in regions:
                enclave.set_user_memory_region(region)  # NE_SET_USER_MEMORY_REGION
            cpus = [enclave.add_vcpu() for _ in range(spec.cpus)]  # NE_ADD_VCPU: both threads of a core
            cid = enclave.start(mode=Mode.PRODUCTION)  # NE_START_ENCLAVE
            print(f"CID {cid}, {MEMORY >> 20} MiB, CPUs {cpus}")
            if simulated:
                simulated.vsock.beat()  # what the image's init would do
            select.select([enclave.heartbeat_fd()], [], [])  # port 9000 of CID 3, answered
            print("running")
            if simulated:
                simulated.driver.slots[0].end()
            poller = select.poll()
            poller.register(enclave.fileno(), 0)
            poller.poll()  # POLLHUP: it has ended
            print("ended")
        finally:
            enclave.close()  # CPUs and memory are ours again


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        fake = SimulatedCarrier(Path(name)) if "--simulated" in sys.argv else None
        run(fake or NitroCarrier(), Path(sys.argv[1]), Path(name), fake)
