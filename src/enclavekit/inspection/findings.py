# SPDX-License-Identifier: Apache-2.0
"""What lint can find: the table of all rules. Codes are stable, for scripts match them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Level(Enum):
    """How bad a finding is."""

    ERROR = "error"
    """It will not boot, or its program will not run."""
    WARNING = "warning"
    """It will surprise."""
    NOTE = "note"
    """Good to know."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. ``where`` is a part of the image: a section, or a path in the enclave's file system."""

    code: str
    level: Level
    message: str
    where: str
    hint: str | None = None


class Rule(NamedTuple):
    """How bad it is, unless a finding knows better, and what it means."""

    level: Level
    text: str


RULES = {
    # the file
    "structure": Rule(Level.ERROR, "It breaks a rule of the format, and some hypervisor refuses it"),
    "structure-odd": Rule(Level.WARNING, "Hypervisors take it, some tools do not"),
    "crc": Rule(Level.ERROR, "The CRC in the header is wrong"),
    "format-version": Rule(Level.WARNING, "QEMU's nitro-enclave machine takes version 4 only"),
    "metadata": Rule(Level.WARNING, "The metadata are not as nitro-cli writes them: its describe-eif fails"),
    "signature": Rule(Level.ERROR, "The signature does not hold, or is of another image"),
    "signature-odd": Rule(Level.WARNING, "The signature is encoded as AWS's tools do not: some readers refuse it"),
    "certificate": Rule(Level.ERROR, "The signing certificate is not valid now: the enclave does not start"),
    "certificate-soon": Rule(Level.WARNING, "The signing certificate expires within 30 days"),
    "one-ramdisk": Rule(Level.NOTE, "PCR1 covers the application too, and PCR2 is a constant that proves nothing"),
    "memory": Rule(Level.ERROR, "The memory given with --memory is too small"),
    "memory-needed": Rule(Level.NOTE, "The smallest memory that it boots with"),
    "image-too-large": Rule(Level.WARNING, "A local machine cannot hold it; an error with --carrier qemu or kvm"),
    # the kernel
    "kernel": Rule(Level.ERROR, "The kernel is none that can boot"),
    "kernel-architecture": Rule(Level.ERROR, "The header names another architecture than the kernel's"),
    "kernel-unread": Rule(Level.NOTE, "The kernel cannot be unpacked here, so nothing is known of its drivers"),
    "kernel-old": Rule(Level.NOTE, "Upstream no longer maintains that version"),
    "kernel-initramfs": Rule(Level.ERROR, "The kernel cannot unpack ramdisks"),
    "kernel-virtio": Rule(Level.ERROR, "No virtio-mmio driver: the enclave has no devices"),
    "kernel-vsock": Rule(Level.ERROR, "No vsock driver: the enclave cannot send its heartbeat"),
    "kernel-nsm": Rule(Level.WARNING, "No NSM driver: the enclave cannot attest"),
    "kernel-console": Rule(Level.WARNING, "No console on a serial port: debug mode shows nothing"),
    "kernel-devtmpfs": Rule(Level.ERROR, "No devtmpfs, which init mounts on /dev"),
    "ec2-discovery": Rule(
        Level.WARNING, "On EC2 the kernel finds no devices, for it looks elsewhere; an error with --carrier nitro"
    ),
    "local-discovery": Rule(
        Level.WARNING,
        "A local machine tells the kernel of its devices as it does not ask; an error with --carrier qemu",
    ),
    "module": Rule(Level.ERROR, "A kernel module that init loads cannot be loaded"),
    "module-version": Rule(Level.WARNING, "A module was made for another kernel version"),
    # the command line
    "cmdline-long": Rule(Level.ERROR, "The kernel cuts the command line off"),
    "cmdline-room": Rule(Level.WARNING, "Little is left for what describes the machine's devices"),
    "cmdline-bytes": Rule(Level.WARNING, "Bytes that are no printable ASCII"),
    "cmdline-console": Rule(Level.WARNING, "No console= for a serial port: debug mode shows nothing"),
    "cmdline-panic": Rule(Level.WARNING, "An enclave whose kernel panics hangs instead of ending"),
    "cmdline-insecure": Rule(Level.WARNING, "Protections are off, or a shell is run instead of init"),
    "cmdline-debug": Rule(Level.NOTE, "Left over from debugging: boot is slower, and the console tells more"),
    "cmdline-trust-cpu": Rule(Level.NOTE, "Random numbers may come late: nothing says that the CPU's are trusted"),
    "cmdline-root": Rule(Level.NOTE, "An enclave's root is its ramdisks; with some kernels root= makes it panic"),
    # ramdisks
    "ramdisk": Rule(Level.ERROR, "The kernel stops unpacking there"),
    "ramdisk-unread": Rule(Level.NOTE, "A ramdisk that cannot be read here: its files are not checked"),
    "ramdisk-alignment": Rule(Level.ERROR, "A plain archive that does not start at a multiple of 4: it is refused"),
    "ramdisk-compression": Rule(Level.ERROR, "The kernel lacks that decompressor"),
    "file-replaced": Rule(Level.WARNING, "A later ramdisk replaces a file of an earlier one"),
    "file-dropped": Rule(Level.WARNING, "The kernel cannot make the file, and says nothing"),
    # init
    "init-missing": Rule(Level.ERROR, "There is no init to run"),
    "init-not-executable": Rule(Level.ERROR, "Init is no file that can be executed"),
    "init-format": Rule(Level.ERROR, "Init is neither an ELF program nor a script"),
    "init-architecture": Rule(Level.ERROR, "Init is for another architecture"),
    "init-interpreter": Rule(Level.ERROR, "The dynamic loader or interpreter that init asks for is missing"),
    "init-library": Rule(Level.ERROR, "A library that init needs is missing"),
    # the program
    "layout-unknown": Rule(Level.NOTE, "Neither enclavekit's layout nor nitro-cli's: the program is not checked"),
    "rootfs-missing": Rule(Level.ERROR, "There is no root file system for the program"),
    "config-missing": Rule(Level.ERROR, "enclavekit's init has no configuration, and ends"),
    "config-invalid": Rule(Level.ERROR, "enclavekit's init refuses its configuration"),
    "cmd-missing": Rule(Level.ERROR, "nitro-cli's init crashes without the file cmd"),
    "env-missing": Rule(Level.ERROR, "nitro-cli's init crashes without the file env"),
    "cmd-empty": Rule(Level.WARNING, "nitro-cli's init runs sh instead"),
    "env-line": Rule(Level.WARNING, "A line of env is no variable"),
    "program-missing": Rule(Level.ERROR, "The program is not where init looks for it"),
    "program-relative": Rule(Level.WARNING, "nitro-cli's init ignores WORKDIR: a relative path starts at /"),
    "program-not-executable": Rule(Level.ERROR, "The program is no file that its user can execute"),
    "program-format": Rule(Level.ERROR, "The program is neither an ELF program nor a script"),
    "program-architecture": Rule(Level.ERROR, "The program, or what it is run by, is for another architecture"),
    "program-interpreter": Rule(Level.ERROR, "The dynamic loader or interpreter that it asks for is missing"),
    "program-library": Rule(Level.ERROR, "A library that it needs is missing"),
    "workdir": Rule(Level.ERROR, "The working directory is none"),
    "workdir-missing": Rule(Level.WARNING, "Init makes the working directory, as root's"),
    "user-root": Rule(Level.NOTE, "The program runs as root"),
    "files-hidden": Rule(Level.WARNING, "Files where init mounts something over them"),
    # leftovers
    "leftover-key": Rule(Level.WARNING, "A private key: whoever has the image has it too"),
    "leftover-ssh": Rule(Level.WARNING, "Someone's SSH files"),
    "leftover-core": Rule(Level.WARNING, "A core file: memory of a process, secrets too"),
    "leftover-tool": Rule(Level.NOTE, "A program for debugging or logging in"),
    "leftover-git": Rule(Level.NOTE, "A git repository, with its history"),
}


def found(code: str, where: str, message: str, *, hint: str | None = None, level: Level | None = None) -> Finding:
    """A finding by the rule of that code."""
    return Finding(code, level or RULES[code].level, message, where, hint)
