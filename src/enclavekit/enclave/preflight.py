# SPDX-License-Identifier: Apache-2.0
"""All that can be checked before a launch, without one: every check is made, so that all that is wrong is seen at once.

Each is the same call that ``run`` makes, so what passes here does not fail there, unless the machine changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from enclavekit import eif
from enclavekit.enclave.directory import claimable
from enclavekit.enclave.doctor_nitro import check_capacity
from enclavekit.enclave.launch_values import check_values
from enclavekit.enclave.run import Plan, RunOptions, check_cpu_list, check_cpus, check_memory, plan
from enclavekit.errors import Error
from enclavekit.hypervisor.carriers import CarrierName, CarrierOptions, Selected, select_carrier
from enclavekit.linux.cgroup import check_controllers


@dataclass(frozen=True, slots=True)
class Check:
    """``detail`` is what was found good; ``error`` what a launch would fail with."""

    name: str
    detail: str = ""
    error: Error | None = None


@dataclass(slots=True)
class Preflight:
    """What a launch would be, as far as it could be."""

    checks: list[Check] = field(default_factory=list)
    selected: Selected | None = None
    planned: Plan | None = None
    measurements: dict[str, str] | None = None
    cid: int | None = None

    @property
    def good(self) -> bool:
        """Whether nothing was found that a launch would fail with."""
        return all(check.error is None for check in self.checks)

    def check(self, name: str, work: Callable[[], str]) -> None:
        """One more."""
        try:
            self.checks.append(Check(name, work()))
        except Error as error:
            self.checks.append(Check(name, error=error))


def preflight(
    file: BinaryIO,
    wanted: CarrierName | None,
    carriers: CarrierOptions,
    options: RunOptions,
    at: datetime,
    *,
    root: Path = Path("/"),
) -> Preflight:
    """Check the image in ``file`` and the machine. FileError when the image cannot be read at all."""
    found = Preflight()

    def carrier() -> str:
        found.selected = select_carrier(wanted, carriers)
        lacks = f"; {found.selected.lacks}" if found.selected.lacks else ""
        return f"{found.selected.name}: {found.selected.reason}{lacks}"

    def image() -> str:
        examined = eif.examine(file, "image", strict=True)
        found.measurements = examined.measurements
        size, count = eif.size_text(examined.image.size), len(examined.image.sections)
        return f"{size}, {count} sections, CRC 0x{examined.measured.crc:08x}"

    def machine() -> str:
        found.planned = plan(file, options.memory, at, options.platform, options.boot, local=local)
        return f"{found.planned.memory >> 20} MiB of memory"

    def memory() -> str:
        if found.planned is not None:
            check_memory(found.planned.memory)
        return "this machine has it"

    def cpus() -> str:
        check_cpus(options.cpus)
        if local:
            check_cpu_list(options.cpu_list)
        return f"{options.cpus}"

    def values() -> str:
        if found.planned is not None:
            check_values(file, found.planned.image, options.values)
        return f"{len(options.values)}"

    def identity() -> str:
        found.cid = claimable(options.runtime_directory, options.cid, options.name)
        return f"CID {found.cid}" + (f", name {options.name}" if options.name else "")

    found.check("carrier", carrier)
    local = found.selected is None or found.selected.name is not CarrierName.NITRO
    found.check("image", image)
    found.check("boot", machine)
    if found.planned is not None and local:
        found.check("memory", memory)
    found.check("cpus", cpus)
    if found.selected is not None and found.selected.name is CarrierName.NITRO and found.planned is not None:
        size = found.planned.memory
        found.check("set aside", lambda: check_capacity(root, memory=size, cpus=options.cpus))
    if options.values and found.planned is not None:
        found.check("launch values", values)
    found.check("identity", identity)
    for address, port in options.publish:

        def publish() -> str:
            address.listen().close()  # noqa: B023 - called at once
            return f"{address.host}:{address.port} leads to port {port}"  # noqa: B023

        found.check("publish", publish)
    if options.cgroup is not None:
        group = options.cgroup.resolve()

        def cgroup() -> str:
            check_controllers(group)
            return f"{group}"

        found.check("cgroup", cgroup)
    return found
