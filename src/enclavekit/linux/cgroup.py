# SPDX-License-Identifier: Apache-2.0
"""A control group with limits (linux: Documentation/admin-guide/cgroup-v2.rst), in a directory that is ours to use."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from enclavekit.errors import FileError, LaunchError

CPU_PERIOD_US = 100_000
CONTROLLERS = ("memory", "cpu")
REMOVE_TRIES = 50
REMOVE_PAUSE_S = 0.02


def check_controllers(parent: Path) -> None:
    """LaunchError unless groups in ``parent`` can limit memory and CPU."""
    try:
        enabled = (parent / "cgroup.subtree_control").read_text().split()
    except OSError as error:
        raise LaunchError(
            f"{parent}: not a directory of cgroup v2: {error.strerror}", hint="one below /sys/fs/cgroup"
        ) from error
    missing = [controller for controller in CONTROLLERS if controller not in enabled]
    if missing:
        raise LaunchError(
            f"{parent}/cgroup.subtree_control: has {' '.join(enabled) or 'nothing'}, expected memory and cpu",
            hint=f"echo '{' '.join('+' + one for one in missing)}' > {parent}/cgroup.subtree_control",
        )


class Cgroup:
    """The group ``path``, made anew: at most ``memory`` bytes, and the time of ``cpus`` CPUs."""

    def __init__(self, path: Path, *, memory: int, cpus: int) -> None:
        check_controllers(path.parent)
        self.path = path
        try:
            self.path.mkdir()
        except OSError as error:
            raise FileError.of(error, self.path, "make the control group") from error
        try:
            (self.path / "memory.max").write_text(f"{memory}\n")
            (self.path / "cpu.max").write_text(f"{cpus * CPU_PERIOD_US} {CPU_PERIOD_US}\n")
        except OSError as error:
            self.remove()
            raise FileError.of(error, self.path, "limit the control group") from error

    def add(self, pid: int) -> None:
        """Put a process into it, with the children that it will have. FileError."""
        try:
            (self.path / "cgroup.procs").write_text(f"{pid}\n")
        except OSError as error:
            raise FileError.of(error, self.path / "cgroup.procs", "write") from error

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel killed a process in it, for its limit."""
        with suppress(OSError, ValueError):
            for line in (self.path / "memory.events").read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count) > 0
        return False

    def remove(self) -> None:
        """When its processes have ended; the kernel may take a moment to see that."""
        for _ in range(REMOVE_TRIES):
            try:
                self.path.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(REMOVE_PAUSE_S)
            else:
                return
