# SPDX-License-Identifier: Apache-2.0
"""What programs can do with the driver, and what it answers: run over the simulator, and over the kernel's own.

A row is steps of host/ne_steps.c and what each of them comes to, NE_CREATE_VM's first. CPUs have letters, for machines
number them differently: a and b are a core, c and d, e and f; z is the other thread of CPU 0's core, n how many there
are. Of a step that lets the driver choose, the letter is what it has chosen.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass

MIB = 1 << 20
KERNEL_HALF = 1 << 63
POLLHUP = 1000 + 0x10
MEM = f"mem=0:{64 * MIB}"
OTHER_MEM = f"mem={128 * MIB}:{64 * MIB}"
PAGE = 2 * MIB
ADD_VCPU, LOAD_INFO, REGION, START = "0xc004ae21", "0xc010ae22", "0x4018ae23", "0xc010ae24"


@dataclass(frozen=True, slots=True)
class Row:
    """``fail`` is a command of the device and its errno, once; ``end``: enclaves end as soon as they run."""

    steps: str
    answers: str
    regions: int = 1024
    slots: int = 4
    pool: bool = True
    strict: bool = False
    end: bool = False
    fail: tuple[str, int] | None = None

    def words(self, cpus: Mapping[str, int]) -> list[str]:
        """Steps for a machine with these CPUs."""
        return [word.format_map(cpus) for word in self.steps.split()]

    def expected(self, cpus: Mapping[str, int]) -> list[int]:
        """Answers there."""
        return [1000 + cpus[word] if word in cpus else int(word) for word in self.answers.split()]


READY = f"{MEM} cpu={{a}} cpu={{b}}"
STARTED = f"{READY} start=0:0"

ROWS = {
    "all goes well": Row(f"info=1 {READY} poll=0 start=1:20 poll=0", "0 0 0 0 0 0 0 0"),
    "256": Row("cpu={a} cpu={a}", "0 0 256"),
    "257 beside CPU 0": Row("cpu={z}", "0 257"),
    "257 another's": Row("cpu={a} create cpu={b}", "0 0 0 257"),
    "259": Row(f"mem=0:{PAGE + 4096}", "0 259"),
    "260": Row(f"at={KERNEL_HALF}:{PAGE}", "0 260"),
    "260 the last page of all": Row(f"at={(1 << 47) - PAGE}:{PAGE}", "0 260"),
    "260 around the end": Row(f"at={(1 << 64) - PAGE}:{2 * PAGE}", "0 260"),
    "261": Row(f"mem=4096:{PAGE}", "0 261"),
    "262": Row(f"mem=0:{2 * PAGE} mem={PAGE}:{2 * PAGE}", "0 0 262"),
    "262 not beside": Row(f"mem={PAGE}:{PAGE} mem=0:{PAGE} mem={2 * PAGE}:{PAGE} mem=0:{4 * PAGE}", "0 0 0 0 262"),
    "262 another enclave may": Row(f"mem=0:{PAGE} create mem=0:{PAGE}", "0 0 0 16"),
    "263": Row(f"small={PAGE} small={PAGE}", "0 263 263", strict=True),
    "265": Row(f"mem=0:{PAGE} mem={4 * PAGE}:{PAGE}", "0 0 265", regions=1),
    "266 268 267 269": Row(
        f"start=0:0 mem=0:{62 * MIB} start=0:0 mem={64 * MIB}:{PAGE} start=0:0 cpu={{a}} start=0:0 cpu={{b}} start=0:0",
        "0 266 0 268 0 267 0 269 0 0",
    ),
    "270": Row(f"{STARTED} cpu=0 info=1 mem={64 * MIB}:{PAGE} start=0:0", "0 0 0 0 0 270 270 270 270"),
    "271": Row("cpu={n} cpu=4294967295", "0 271 271"),
    "272": Row(f"{'cpu=0 ' * 7}", "0 0 0 0 0 0 0 272"),
    "272 a second enclave": Row(f"{'cpu=0 ' * 6} create", "0 0 0 0 0 0 0 272"),
    "272 no pool": Row("", "272", pool=False),
    "274": Row(f"info=0 info=2 info=3 mem=0:{PAGE}:1 start=2:0", "0 274 274 274 274 274"),
    "275": Row(f"start=0:1 start=0:2 start=0:3 start=0:{(1 << 32) - 1} start=0:{1 << 32}", "0 275 275 275 275 275"),
    # Of several that are wrong, the first counts.
    "274 before 275": Row("start=2:3", "0 274"),
    "274 before 270 in memory": Row(f"{STARTED} mem=1:1:1", "0 0 0 0 0 274"),
    "275 before 270": Row(f"{STARTED} start=0:3 start=2:3", "0 0 0 0 0 275 274"),
    "270 before 274 in info": Row(f"{STARTED} info=0", "0 0 0 0 0 270"),
    "270 before 271": Row(f"{STARTED} cpu={{n}}", "0 0 0 0 0 270"),
    "270 before EIO": Row(f"{STARTED} child=cpu=0 child=mem=1:1", "0 0 0 0 0 270 270"),
    "EFAULT before 270": Row(f"{STARTED} fault={ADD_VCPU} fault={START}", "0 0 0 0 0 14 14"),
    "EIO before 259": Row("child=mem=1:1", "0 5"),
    "271 before EIO": Row("child=cpu={n}", "0 271"),
    "259 before 261": Row("mem=4096:4096", "0 259"),
    "261 before 260": Row(f"at={KERNEL_HALF + 4096}:{PAGE}", "0 261"),
    "262 before EFAULT": Row(f"mem=0:{PAGE} hole=0:{PAGE} mem=0:{PAGE}", "0 0 0 262"),
    "EFAULT before 265": Row(f"mem=0:{PAGE} at={1 << 32}:{PAGE}", "0 0 14", regions=1),
    # Ordinary errors.
    "ENOTTY": Row("other=0xae25 node=0xc004ae21", "0 25 25"),
    "EFAULT": Row(f"fault={ADD_VCPU} fault={LOAD_INFO} fault={REGION} fault={START}", "0 14 14 14 14"),
    "EFAULT memory": Row(f"at={1 << 32}:{PAGE} hole={PAGE}:{PAGE} mem=0:{2 * PAGE} mem=0:{PAGE}", "0 14 0 14 0"),
    "EFAULT slot": Row("bad create create", "0 14 0 12", slots=2),
    "ENOMEM": Row("mem=0:0 at=0:0", "0 12 12"),
    "ENOMEM slots": Row("create create create create", "0 0 0 0 12", slots=4),
    "EIO": Row("child=cpu=0 child=info=1", "0 5 0"),
    "EIO takes the core": Row("child=cpu={a} create cpu={a} cpu={c}", "0 5 0 257 0"),
    "EBUSY one CID": Row(
        f"{READY} start=0:20 create {OTHER_MEM} cpu={{c}} cpu={{d}} start=0:20", "0 0 0 0 0 0 0 0 0 16"
    ),
    "EBADF": Row("close cpu=0", "0 0 9"),
    # What the driver chooses.
    "the rest of a core first": Row("cpu={d} any any any any any any", "0 0 c a b e f 272"),
    "cores in order": Row("any any any", "0 a b c"),
    "a closed enclave's cores": Row("any any close create any", "0 a b 0 0 a"),
    # Life.
    "another process may start": Row(f"{READY} child=start=0:0", "0 0 0 0 0"),
    "its end": Row(f"{STARTED} poll=20000 poll=0 cpu=0", f"0 0 0 0 0 {POLLHUP} {POLLHUP} 270", end=True),
    "two at once": Row(f"{STARTED} create {OTHER_MEM} cpu=0 cpu=0 start=0:0 poll=0", "0 0 0 0 0 0 0 0 0 0 0"),
    # What the device refuses.
    "refused slot": Row("", "28", fail=("SLOT_ALLOC", errno.ENOSPC)),
    "refused memory": Row(
        f"mem=0:{PAGE} mem=0:{PAGE} mem={PAGE}:{PAGE}", "0 22 262 0", fail=("SLOT_ADD_MEM", errno.EINVAL)
    ),
    "refused CPU": Row("cpu={a} cpu={a} cpu={a}", "0 22 0 256", fail=("SLOT_ADD_VCPU", errno.EINVAL)),
    "refused start": Row(
        f"{READY} start=0:0 poll=0 cpu={{c}} cpu={{d}} start=0:0",
        "0 0 0 0 74 0 0 0 0",
        fail=("ENCLAVE_START", errno.EBADMSG),
    ),
}

LEAKS = {
    "refused free": Row("cpu={a} close create cpu={a} cpu={c}", "0 0 0 0 257 0", fail=("SLOT_FREE", errno.EIO)),
    "refused stop": Row(
        f"{MEM} cpu={{c}} cpu={{d}} start=0:0 close create cpu={{c}} cpu={{e}}",
        "0 0 0 0 0 0 0 257 0",
        fail=("ENCLAVE_STOP", errno.EIO),
    ),
}
"""After these, the driver has lost CPUs for good."""
