#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the root filesystem of the hello example: ``make_rootfs.py DIRECTORY``.

The program in it is the distribution's own busybox-static, taken from its mirror by the same means as the runtime, and
kept there: a second time no network is touched. DIRECTORY is replaced.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from enclavekit.environment import data_directory
from enclavekit.errors import Error
from enclavekit.runtime.install import Runtime

APPLETS = ("awk", "cat", "echo", "env", "free", "grep", "id", "ls", "nproc", "ps", "sh", "sleep", "sort", "uname")
DIRECTORIES = {"app": 0o755, "bin": 0o755, "dev": 0o755, "etc": 0o755, "proc": 0o555, "sys": 0o555, "tmp": 0o1777}
ACCOUNTS = "root:x:0:0:root:/:/bin/sh\napp:x:1000:1000:app:/:/bin/sh\n"
GROUP = "root:x:0:\napp:x:1000:\n"


def main() -> None:
    """The program."""
    if len(sys.argv) != 2:
        sys.exit("usage: make_rootfs.py DIRECTORY")
    try:
        package = Runtime(data_directory() / "runtime").install_package("busybox-static")
    except Error as error:
        sys.exit(f"make_rootfs: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
    make_rootfs(Path(sys.argv[1]), package)


def make_rootfs(root: Path, package: Path) -> None:
    """Lay the files in ``root``: the same ones with the same modes for every user and umask."""
    busybox = next(path for path in (package / "usr/bin/busybox", package / "bin/busybox") if path.is_file())
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name, mode in {".": 0o755, **DIRECTORIES}.items():
        (root / name).mkdir(exist_ok=True)
        (root / name).chmod(mode)
    for name, source, mode in (
        ("bin/busybox", busybox.read_bytes(), 0o755),
        ("app/hello", Path(__file__).with_name("hello.sh").read_bytes(), 0o755),
        ("etc/passwd", ACCOUNTS.encode(), 0o644),
        ("etc/group", GROUP.encode(), 0o644),
    ):
        (root / name).write_bytes(source)
        (root / name).chmod(mode)
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")


if __name__ == "__main__":
    main()
