# SPDX-License-Identifier: Apache-2.0
"""A system with a fake apt, whose mirror the test decides."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from enclavekit.runtime.apt import Host

KERNEL = "6.12.117+deb13-cloud-amd64"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = "#!/bin/sh\necho 'QEMU emulator version 11.1.3 (Debian 1:11.1.3)'\n"
SOURCES = """\
Types: deb
URIs: http://mirror.example.org/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


def packages() -> dict[str, Any]:
    """What the mirror has: name -> version, files, dependencies."""
    return {
        "qemu-system-x86": {
            "version": "1:11.1.3+ds-1~bpo13+1",
            "depends": ["libc6", "seabios"],
            "files": {
                "usr/bin/qemu-system-x86_64": [0o755, "program"],
                "usr/bin/qemu-system-i386": [0o755, "not wanted"],
                f"{LIBRARIES}/qemu/module.so": [0o644, "module"],
                "usr/share/qemu/qboot.rom": [0o644, "rom"],
            },
        },
        "libc6": {
            "version": "2.41-12+deb13u5",
            "files": {
                f"{LIBRARIES}/ld-linux-x86-64.so.2": [0o755, LOADER],
                f"{LIBRARIES}/gconv/UTF-7.so": [0o644, "not wanted"],
            },
        },
        "seabios": {"version": "1.16", "files": {"usr/share/seabios/bios.bin": [0o644, "bios"]}},
        "linux-image-cloud-amd64": {
            "version": "6.12.117-1",
            "depends": [f"linux-image-{KERNEL}"],
            "files": {},
        },
        f"linux-image-{KERNEL}": {
            "version": "6.12.117-1",
            "depends": ["kmod", f"linux-modules-{KERNEL}"],
            "files": {
                f"boot/vmlinuz-{KERNEL}": [0o644, "kernel"],
                f"boot/config-{KERNEL}": [0o644, "config"],
                f"boot/System.map-{KERNEL}": [0o644, "not wanted"],
            },
        },
        f"linux-modules-{KERNEL}": {
            "version": "6.12.117-1",
            "depends": [],
            "files": {f"usr/lib/modules/{KERNEL}/kernel/vsock.ko.xz": [0o644, "module"]},
        },
        "busybox-static": {"version": "1:1.37.0-6+b9", "files": {"usr/bin/busybox": [0o755, "busybox"]}},
    }


@dataclass
class FakeSystem:
    """Programs, configuration and mirror below one directory."""

    directory: Path
    world: dict[str, Any] = field(default_factory=lambda: {"packages": packages()})

    def __post_init__(self) -> None:
        script = f"#!{sys.executable} -IS\n" + Path(__file__).with_name("fake_apt.py").read_text()
        for name in ("apt-get", "apt-cache", "apt-helper", "dpkg-deb"):
            (self.directory / name).write_text(script)
            (self.directory / name).chmod(0o755)
        (self.directory / "os-release").write_text('ID=debian\nVERSION_CODENAME=bookworm\nPRETTY_NAME="Debian 12"\n')
        (self.directory / "etc/sources.list.d").mkdir(parents=True)
        (self.directory / "etc/sources.list.d/debian.sources").write_text(SOURCES)

    def host(self, **changes: Any) -> Host:
        """The system, with its world as it is now."""
        (self.directory / "world.json").write_text(json.dumps(self.world))
        at = self.directory
        host = Host(
            apt_get=at / "apt-get",
            apt_cache=at / "apt-cache",
            apt_helper=at / "apt-helper",
            dpkg_deb=at / "dpkg-deb",
            etc=at / "etc",
            os_release=at / "os-release",
            machine="x86_64",
            free_space=lambda _: 1 << 40,
        )
        return replace(host, **changes)

    def calls(self) -> list[str]:
        """Each call so far: program and words."""
        path = self.directory / "calls"
        return path.read_text().splitlines() if path.exists() else []
