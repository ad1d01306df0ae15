# SPDX-License-Identifier: Apache-2.0
"""Images that break rules about ramdisks, init, the program and what lies about."""

from __future__ import annotations

import lzma
import stat

from elf_files import elf_file
from lint_cases import GLIBC, KEY, WITH_LOADER, Case, apps, boots, both, cmdline, dynamic, holds, kernel, runs, sets
from lint_images import APPLICATION, BOOT, CONFIG, DIRECTORY, FILE, PROGRAM, STATIC, SYMLINK, archive

from enclavekit.image.kernel_features import Feature

CASES = [
    # ramdisks
    Case(
        "ramdisk",
        "ramdisk 1",
        "cpio entry at offset 0xNNN: magic b'xxxxxx', expected b'070701'",
        sets(
            ramdisks=[
                archive(BOOT),
                archive(APPLICATION).replace(b"070701", b"xxxxxx", 4).replace(b"xxxxxx", b"070701", 3),
            ]
        ),
    ),
    Case(
        "ramdisk-unread",
        "ramdisk 1",
        "ramdisk at offset 0x0: compressed with lzo, which cannot be read here",
        sets(ramdisks=[archive(BOOT), b"\x89LZO..."]),
    ),
    Case(
        "ramdisk-unread",
        "ramdisk 2",
        "ramdisks 2 and up are not checked: they come after one that ends badly",
        sets(ramdisks=[archive(BOOT), b"\x89LZO...", archive(APPLICATION)]),
    ),
    Case(
        "ramdisk-alignment",
        "ramdisk 1",
        "a plain archive at 0x2d1 of all ramdisks together, expected a multiple of 4",
        sets(ramdisks=[archive(BOOT) + bytes(209), archive(APPLICATION)]),
    ),
    Case(
        "ramdisk-compression",
        "ramdisk 1",
        "compressed with xz, and the kernel has no decompressor for that",
        both(kernel(Feature.XZ), sets(ramdisks=[archive(BOOT), lzma.compress(archive(APPLICATION))])),
    ),
    Case(
        "file-replaced",
        "ramdisk 1: /init",
        "replaces the one of ramdisk 0",
        holds({"init": (PROGRAM, STATIC)}),
    ),
    Case(
        "file-dropped",
        "ramdisk 1: /rootfs/no/file",
        "cannot be made: no no",
        holds({"rootfs/no/file": (FILE, b"x")}),
    ),
    # init
    Case("init-missing", "/init", "no init: no init", boots(init=None)),
    Case("init-missing", "/init", "no init: no gone", boots(init=(SYMLINK, b"gone"))),
    Case("init-missing", "/boot/start", "no init: no boot", cmdline("rdinit=/boot/start")),
    Case("init-not-executable", "/init", "/init: mode 0644, not executable by user 0", boots(init=(FILE, STATIC))),
    Case("init-not-executable", "/init", "/init: a directory, expected a regular file", boots(init=(DIRECTORY, b""))),
    Case(
        "init-format",
        "/init",
        "/init: starts with b'text', expected an ELF program or #!",
        boots(init=(PROGRAM, b"text")),
    ),
    Case(
        "init-architecture",
        "/init",
        "/init: for aarch64, expected x86_64",
        boots(init=(PROGRAM, elf_file(machine=183))),
    ),
    Case(
        "init-interpreter",
        "/init",
        f"{GLIBC}, which /init asks for: no lib64",
        boots(init=(PROGRAM, dynamic())),
    ),
    Case(
        "init-interpreter",
        "/init",
        "/bin/sh, which /init asks for: no bin",
        boots(init=(PROGRAM, b"#!/bin/sh\n")),
    ),
    Case(
        "init-library",
        "/init",
        "libc.so.6, which /init needs: in no directory",
        boots(
            init=(PROGRAM, dynamic(b"libc.so.6")),
            lib64=(DIRECTORY, b""),
            **{"lib64/ld-linux-x86-64.so.2": (PROGRAM, elf_file(kind=3))},
        ),
    ),
    # the program
    Case(
        "layout-unknown",
        "/",
        "neither config nor cmd and env: the program is not checked",
        sets(ramdisks=[archive(BOOT), archive({"data": (FILE, b"x")})]),
    ),
    Case(
        "rootfs-missing",
        "/rootfs",
        "no root file system: no rootfs",
        sets(ramdisks=[archive(BOOT), archive({"config": (FILE, CONFIG.encode())})]),
    ),
    Case(
        "rootfs-missing",
        "/rootfs",
        "no root file system: a file",
        sets(ramdisks=[archive(BOOT), archive({"config": (FILE, CONFIG.encode()), "rootfs": (FILE, b"")})]),
    ),
    Case(
        "config-missing",
        "/config",
        "no configuration: no config",
        both(boots(modules=(DIRECTORY, b"")), holds({"config": None})),
    ),
    Case(
        "config-invalid",
        "/config",
        "init configuration: the last record has no NUL at its end",
        holds({"config": (FILE, b"version=1")}),
    ),
    Case("cmd-missing", "/cmd", "no cmd: init crashes", holds({"cmd": None}), nitro=True),
    Case("env-missing", "/env", "no env: init crashes", holds({"env": None}), nitro=True),
    Case("cmd-empty", "/cmd", "no program: init runs sh instead", holds({"cmd": (FILE, b"")}), nitro=True),
    Case(
        "env-line",
        "/env",
        "'second line', expected NAME=VALUE",
        holds({"env": (FILE, b"A=first\nsecond line\n")}),
        nitro=True,
    ),
    Case(
        "program-missing",
        "/rootfs: /bin/app",
        "/bin/app: no app",
        holds({"rootfs/bin/app": None}),
    ),
    Case(
        "program-missing",
        "/rootfs: app",
        "in no directory of /opt:/usr/bin",
        runs(arguments=(b"app",), environment=(b"PATH=/opt:/usr/bin",)),
    ),
    Case(
        "program-missing",
        "/rootfs: app",
        "in no directory of /sbin:/usr/sbin:/bin:/usr/bin",
        holds(
            {
                "rootfs/bin/app": None,
                "rootfs/opt": (DIRECTORY, b""),
                "rootfs/opt/app": (PROGRAM, STATIC),
                "env": (FILE, b"PATH=/opt\n"),
                "cmd": (FILE, b"app\n"),
            }
        ),
        nitro=True,
    ),
    Case(
        "program-missing",
        "/rootfs: /tmp/app",
        "/tmp/app: no app",
        holds({"rootfs/tmp/app": (PROGRAM, STATIC), "cmd": (FILE, b"/tmp/app\n")}),
        nitro=True,
    ),
    Case(
        "program-relative",
        "/rootfs: bin/app",
        "a relative path: it starts at /, for init ignores WORKDIR",
        holds({"cmd": (FILE, b"bin/app\n")}),
        nitro=True,
    ),
    Case(
        "program-not-executable",
        "/rootfs: /bin/app",
        "/bin/app: mode 0700, not executable by user 1000",
        apps(STATIC, stat.S_IFREG | 0o700),
    ),
    Case(
        "program-format",
        "/rootfs: /bin/app",
        "/bin/app: starts with b'echo', expected an ELF program or #!",
        apps(b"echo hello\n"),
    ),
    Case(
        "program-architecture",
        "/rootfs: /bin/app",
        "/bin/app: for aarch64, expected x86_64",
        apps(elf_file(machine=183)),
    ),
    Case(
        "program-interpreter",
        "/rootfs: /bin/app",
        f"{GLIBC}, which /bin/app asks for: no lib64",
        apps(dynamic()),
    ),
    Case(
        "program-interpreter",
        "/rootfs: /bin/app",
        "/bin/sh, which /bin/app asks for: no sh",
        apps(b"#!/bin/sh\n"),
    ),
    Case(
        "program-library",
        "/rootfs: /bin/app",
        "libz.so.1, which /bin/app needs: in no directory",
        both(holds(WITH_LOADER), apps(dynamic(b"libz.so.1"))),
    ),
    Case(
        "workdir",
        "/rootfs/bin/app",
        "a file, expected a directory",
        runs(workdir=b"/bin/app"),
    ),
    Case(
        "workdir-missing",
        "/rootfs/data",
        "no data: init makes it, as root's, and the program runs as user 1000",
        runs(workdir=b"/data"),
    ),
    Case("user-root", "/config", "the program runs as root", runs(uid=0, gid=0)),
    Case("user-root", "/cmd", "the program runs as root: nitro-cli's init ignores USER", sets(), nitro=True),
    Case(
        "files-hidden",
        "/rootfs/dev",
        "/dev/a: hidden, for init mounts something on /dev",
        holds({"rootfs/dev": (DIRECTORY, b""), "rootfs/dev/a": (FILE, b"a")}),
    ),
    Case(
        "files-hidden",
        "/rootfs/tmp",
        "/tmp/a and 1 more: hidden, for init mounts something on /tmp",
        holds({"rootfs/tmp/a": (FILE, b"a"), "rootfs/tmp/b": (FILE, b"b")}),
        nitro=True,
    ),
    # leftovers
    Case("leftover-key", "/rootfs/server.pem", "a private key", holds({"rootfs/server.pem": (FILE, KEY)})),
    Case(
        "leftover-ssh",
        "/rootfs/.ssh",
        "files of a user's SSH",
        holds({"rootfs/.ssh": (DIRECTORY, b""), "rootfs/.ssh/config": (FILE, b"")}),
    ),
    Case("leftover-core", "/rootfs/core.17", "a core file", holds({"rootfs/core.17": (FILE, elf_file(kind=4))})),
    Case(
        "leftover-tool",
        "/rootfs/bin/strace",
        "a program for debugging or logging in",
        holds({"rootfs/bin/strace": (PROGRAM, STATIC)}),
    ),
    Case(
        "leftover-git",
        "/rootfs/.git",
        "a git repository",
        holds({"rootfs/.git": (DIRECTORY, b""), "rootfs/.git/HEAD": (FILE, b"")}),
    ),
]
