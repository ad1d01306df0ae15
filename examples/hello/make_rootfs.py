# SPDX-License-Identifier: Apache-2.0
"""Lay out a small root filesystem from a real package: Debian's static busybox, and a program of our own.

python examples/hello/make_rootfs.py DIR
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from enclavekit.cli.environment import data_directory
from enclavekit.runtime import Progress, Runtime

APPLETS = ("awk", "cat", "env", "grep", "id", "ls", "nproc", "sh", "sleep", "uname")


def busybox() -> Path:
    """The program, downloaded once."""
    steps: set[str] = set()

    def tell(progress: Progress) -> None:
        if progress.step not in steps:
            steps.add(progress.step)
            print(progress.step, file=sys.stderr)

    return (
        Runtime(data_directory() / "runtime").packages(["busybox-static"], dict(os.environ), tell) / "usr/bin/busybox"
    )


def make_rootfs(root: Path) -> None:
    """bin/ with busybox and hello, etc/ with an ordinary user."""
    (root / "bin").mkdir(parents=True)
    (root / "etc").mkdir()
    shutil.copy(busybox(), root / "bin/busybox")
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    shutil.copy(Path(__file__).with_name("hello"), root / "bin/hello")
    (root / "bin/hello").chmod(0o755)
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\napp:x:1000:1000:app:/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\napp:x:1000:\n")


if __name__ == "__main__":
    make_rootfs(Path(sys.argv[1]))
