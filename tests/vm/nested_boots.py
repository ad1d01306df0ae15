# SPDX-License-Identifier: Apache-2.0
"""Runs inside the nested machine: boots images on carrier ``kvm``.

``python3 boots.py IMAGE:PROTOCOL:CPUS:MIB …`` prints a line of JSON for each; the image is /IMAGE.eif.
"""

import json
import sys
import time
from pathlib import Path

from enclavekit.enclave.run import RunOptions, run
from enclavekit.enclave.supervisor import Streams
from enclavekit.errors import Error
from enclavekit.hypervisor.contract import Mode
from enclavekit.hypervisor.kvm import KvmCarrier
from enclavekit.platform.machine import BootProtocol

HOME = Path("/run/enclavekit")


def boot(image: str, protocol: str, cpus: int, memory: int) -> dict[str, object]:
    """What came of one."""
    output, console = bytearray(), bytearray()
    options = RunOptions(
        HOME,
        memory=memory,
        cpus=cpus,
        boot=BootProtocol(protocol),
        mode=Mode.DEBUG,
        attestation_directory=HOME / "attest",
    )
    found: dict[str, object] = {"boot": f"{image}:{protocol}:{cpus}:{memory >> 20}"}
    began = time.monotonic()
    try:
        with Path(f"/{image}.eif").open("rb") as file:
            streams = Streams(output=output.extend, console=console.extend)
            found["exit_code"] = run(file, KvmCarrier(), options, streams, lambda _: None).exit_code
    except Error as error:
        found["error"] = f"{error.code}: {error.message}"
    found["seconds"] = round(time.monotonic() - began, 1)
    found["output"] = output.decode(errors="replace").splitlines()
    found["console"] = console.decode(errors="replace")
    return found


if __name__ == "__main__":
    for word in sys.argv[1:]:
        image, protocol, cpus, mib = word.split(":")
        print("boot:", json.dumps(boot(image, protocol, int(cpus), int(mib) << 20)), flush=True)  # noqa: T201
