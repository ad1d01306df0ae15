# SPDX-License-Identifier: Apache-2.0
"""What an image is made of, by digest: for the lock file, and to explain where each PCR comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from enclavekit.eif import Input, Lock, Measurements
from enclavekit.eif.lock import CONTAINER_ID, IMAGE, KERNEL
from enclavekit.errors import LockedError
from enclavekit.image.sources import Source

SECTIONS = ("kernel", "cmdline", "metadata", "ramdisk-0", "ramdisk-1")
"""In their order in the file."""

PCRS = {
    # name: the sections that it covers, in the order in which they are hashed
    "PCR0": ("kernel", "cmdline", "ramdisk-0", "ramdisk-1"),
    "PCR1": ("kernel", "cmdline", "ramdisk-0"),
    "PCR2": ("ramdisk-1",),
}


def inputs_of(
    named: str, source: Source, *, kernel: Input, programs: Mapping[str, bytes], sections: Mapping[str, bytes]
) -> tuple[Input, ...]:
    """``named`` is the source in a word; ``programs`` are init and the modules; ``sections`` small ones, and init's
    configuration. The root file system of a directory or a tar has no digest of its own: PCR2 is its.
    """
    inputs = []
    if source.container:
        what = named if named.startswith("docker://") else named.partition(":")[0]
        if source.container.manifest:
            inputs.append(Input(IMAGE, what, str(source.container.manifest)))
        inputs.append(Input(CONTAINER_ID, "", str(source.container.config_digest)))
    inputs.append(kernel)
    inputs += [Input(name, "", _sha384(data)) for name, data in programs.items()]
    inputs += [
        Input(name, data.decode("ascii") if name == "cmdline" else "", _sha384(data)) for name, data in sections.items()
    ]
    return tuple(inputs)


def section_of(name: str) -> str:
    """The section that an input ends up in."""
    if name in (IMAGE, CONTAINER_ID, "configuration"):
        return "ramdisk-1"
    return name if name in SECTIONS else "ramdisk-0"


def measured(measurements: Measurements, pcr8: bytes | None) -> dict[str, str]:
    """By ``PCR0`` and so on, in hexadecimal."""
    found = {"PCR0": measurements.pcr0, "PCR1": measurements.pcr1, "PCR2": measurements.pcr2, "PCR8": pcr8}
    return {name: pcr.hex() for name, pcr in found.items() if pcr is not None}


def check_inputs(locked: Lock, now: Lock) -> None:
    """LockedError unless all is as it was locked."""
    moved = locked.moved(now)
    if not moved:
        return
    kernel = locked.find(KERNEL)
    found = now.find(KERNEL)
    hint = "without --locked the lock file is made anew"
    if kernel and found and kernel.digest != found.digest:
        hint = f"enclave kernel import FILE, of the kernel {kernel.what} with {kernel.digest}; {hint}"
    raise LockedError(f"enclave.lock: {'; '.join(moved)}", hint=hint)


def check_measurements(locked: Lock, now: Lock) -> None:
    """LockedError unless the image measures as the locked one did."""
    moved = locked.moved_measurements(now.measurements)
    if moved:
        # With all inputs the same, what is left is the root file system of a directory or a tar.
        raise LockedError(
            f"enclave.lock: {'; '.join(moved)}",
            hint="the files of the source have changed; without --locked the lock file is made anew",
        )


def _sha384(data: bytes) -> str:
    return f"sha384:{hashlib.sha384(data).hexdigest()}"
