# SPDX-License-Identifier: Apache-2.0
"""The pool of CPUs that enclaves get theirs from: the driver's, or where there is none all that we may run on.

Source: aws-nitro-enclaves-cli src/enclave_proc/cpu_info.rs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from enclavekit.errors import FileError
from enclavekit.nitro_cli.codes import Code
from enclavekit.nitro_cli.command import NitroCliError

NE_CPUS = Path("/sys/module/nitro_enclaves/parameters/ne_cpus")
MAX_CPU = 1 << 16


def read_pool(ne_cpus: Path | None = None) -> list[int]:
    """Numbers of CPUs, ascending. NitroCliError: E19, E23, E24."""
    ne_cpus = ne_cpus or NE_CPUS
    try:
        text = ne_cpus.read_text()
    except FileNotFoundError:
        return sorted(os.sched_getaffinity(0))
    except (OSError, ValueError) as error:
        message = FileError.of(error, ne_cpus, "read").message if isinstance(error, OSError) else f"{ne_cpus}: no text"
        raise NitroCliError(Code.FILE_OPERATION, message, file=str(ne_cpus), operation="Read") from error
    return parse_pool(text, str(ne_cpus))


def parse_pool(text: str, where: str) -> list[int]:
    """``1,9`` or ``2-3,6-9``; nothing is no CPU. NitroCliError: E23, E24."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if not part:
            continue
        first, dash, last = part.partition("-")
        for word in (first, last) if dash else (first,):
            if not word.isascii() or not word.isdigit() or int(word) >= MAX_CPU:
                raise NitroCliError(Code.MALFORMED_CPU_ID, f"{where}: {word[:32]!r}, expected the number of a CPU")
        if dash and int(first) > int(last):
            raise NitroCliError(Code.CPU_INTERVAL, f"{where}: {part!r} ends before it begins")
        found.update(range(int(first), int(last or first) + 1))
    return sorted(found)


def choose_cpus(pool: Sequence[int], count: int | None, ids: Sequence[int] | None) -> list[int]:
    """The CPUs that were named, or the first ``count`` of the pool. NitroCliError: E20, E21, E22."""
    if ids is not None:
        for number in ids:
            if ids.count(number) > 1:
                raise NitroCliError(Code.INVALID_CPUS, f"CPU {number} is named more than once")
            if number not in pool:
                have = ", ".join(map(str, pool[:64])) or "none"
                raise NitroCliError(Code.NO_SUCH_CPU, f"CPU {number} is not in the pool ({have})")
        return list(ids)
    if (count or 0) > len(pool):
        raise NitroCliError(Code.INSUFFICIENT_CPUS, f"{count} CPUs were asked for, the pool has {len(pool)}")
    return list(pool[: count or 0])
