# SPDX-License-Identifier: Apache-2.0
"""How much memory this machine, or this process's cgroup, can still give (proc(5), linux: cgroup-v2.rst)."""

from __future__ import annotations

import re
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
_AVAILABLE = re.compile(r"^MemAvailable:\s+([0-9]+) kB$", re.MULTILINE)


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes, without swap; None where the kernel does not say."""
    limits = []
    try:
        found = _AVAILABLE.search((proc / "meminfo").read_text())
        if found:
            limits.append(int(found[1]) * 1024)
    except (OSError, ValueError):
        pass
    limits += _cgroup_limits(proc, cgroups)
    return min(limits) if limits else None


def _cgroup_limits(proc: Path, cgroups: Path) -> list[int]:
    """What is left to each cgroup from ours up to the root."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None or ".." in own.split("/"):
        return []
    found = []
    directory = cgroups / own
    while directory != cgroups.parent:
        try:
            most, used = ((directory / f"memory.{name}").read_text().strip() for name in ("max", "current"))
            # Page cache counts as used, though it would be given up.
            cache = re.search(r"^file ([0-9]+)$", (directory / "memory.stat").read_text(), re.MULTILINE)
            if most != "max":
                found.append(max(int(most) - int(used) + (int(cache[1]) if cache else 0), 0))
        except (OSError, ValueError):
            pass
        directory = directory.parent
    return found
