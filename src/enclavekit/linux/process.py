# SPDX-License-Identifier: Apache-2.0
"""Processes: one that dies with its parent (prctl(2), PR_SET_PDEATHSIG), what one may use, what it uses (proc(5))."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1


def dies_with_parent() -> Callable[[], None]:
    """For ``preexec_fn``: the kernel kills the child when the thread that made it ends."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def before_exec() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it went in between
            os._exit(1)

    return before_exec


def allow_many_files() -> None:
    """As many open files as the system lets us have (getrlimit(2))."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def usage_of(pid: int) -> tuple[float, int] | None:
    """Seconds of CPU and bytes of resident memory; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # utime, stime and rss are fields 14, 15 and 24; the split begins with field 3.
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
