# SPDX-License-Identifier: Apache-2.0
"""Images that break rules about the file, the kernel and its command line."""

from __future__ import annotations

import json
import lzma

from kernel_files import bzimage
from lint_cases import Case, boots, both, cmdline, kernel, metadata, module, sets
from lint_images import APPLICATION, BOOT, CMDLINE, DIRECTORY, FILE, archive

from enclavekit.eif import Arch
from enclavekit.image.kernel_features import Feature
from enclavekit.inspection.findings import Level

STRINGS = "going by its strings"

CASES = [
    # the file
    Case(
        "format-version",
        "header",
        "format version 3, QEMU's nitro-enclave machine expects 4",
        sets(version=3, metadata=None),
    ),
    Case(
        "metadata",
        "metadata",
        "metadata: ImageName is NoneType, expected a string: nitro-cli describe-eif fails (E35)",
        sets(metadata=json.dumps({"BuildMetadata": {}, "DockerInfo": None, "CustomMetadata": None}).encode()),
    ),
    Case(
        "metadata",
        "metadata",
        "CustomMetadata is no object: nitro-cli describe-eif fails (E17)",
        metadata(CustomMetadata=["a"]),
    ),
    Case(
        "one-ramdisk",
        "ramdisk 0",
        "one ramdisk: PCR0 and PCR1 are the same, and PCR2 is that of nothing",
        sets(ramdisks=[archive({**BOOT, **APPLICATION})]),
    ),
    Case(
        "memory-needed",
        "file",
        "nitro-cli run-enclave (4 times the file) needs 64 MiB",
        sets(),
        memory=None,
        carrier="nitro",
    ),
    Case("memory-needed", "file", "a local machine needs 81 MiB", sets(), memory=None, carrier="qemu"),
    Case(
        "memory",
        "file",
        "memory: got 63.5 MiB, nitro-cli run-enclave (4 times the file) needs 64 MiB",
        sets(),
        memory=127 << 19,
        carrier="nitro",
    ),
    Case(
        "memory",
        "file",
        "memory: got 80 MiB, a local machine needs 81 MiB",
        sets(),
        memory=80 << 20,
        carrier="kvm",
    ),
    *(
        Case(
            "image-too-large",
            "file",
            "image of SIZE bytes: with its kernel it ends at 0xc0800000, expected at most 0xc0000000:"
            " a local machine's memory has a hole there",
            kernel(init_size=0xBF800000),
            carrier=carrier,
            level=level,
        )
        for carrier, level in ((None, Level.WARNING), ("qemu", Level.ERROR))
    ),
    # the kernel
    Case("kernel", "kernel", "not a kernel: no bzImage (x86_64) and no Image (aarch64)", sets(kernel=b"vmlinux")),
    Case(
        "kernel-architecture",
        "kernel",
        "a kernel for x86_64, the header says aarch64",
        sets(arch=Arch.AARCH64),
    ),
    Case(
        "kernel-unread",
        "kernel",
        "compressed with lzo, which cannot be read here",
        sets(kernel=bzimage(b"\x89LZO...")),
    ),
    Case(
        "kernel-old",
        "kernel",
        "Linux 4.14.256-209.484.amzn2, upstream maintains 5.10 and later",
        kernel(release="4.14.256-209.484.amzn2"),
    ),
    Case("kernel-initramfs", "kernel", f"no support for ramdisks, {STRINGS}", kernel(Feature.INITRAMFS)),
    Case("kernel-virtio", "kernel", f"no virtio-mmio driver, {STRINGS}", kernel(Feature.VIRTIO_MMIO)),
    Case("kernel-vsock", "kernel", f"no virtio vsock driver, {STRINGS}", kernel(Feature.VSOCK)),
    Case(
        "kernel-vsock",
        "kernel",
        "no virtio vsock driver, going by its configuration",
        kernel(configuration="CONFIG_VSOCKETS=m\nCONFIG_VIRTIO_VSOCKETS=m\nCONFIG_MODULES=y\n"),
    ),
    Case("kernel-nsm", "kernel", f"no NSM driver, {STRINGS}", kernel(Feature.NSM)),
    Case("kernel-console", "kernel", f"no console on a serial port, {STRINGS}", kernel(Feature.SERIAL_CONSOLE)),
    Case("kernel-devtmpfs", "kernel", f"no devtmpfs, {STRINGS}", kernel(Feature.DEVTMPFS)),
    *(
        Case(
            "ec2-discovery",
            "kernel",
            f"{words}, {STRINGS}: on EC2 it finds neither vsock nor NSM",
            kernel(*features, banner="6.12.1-test (Debian) #1"),
            carrier=carrier,
            level=level,
        )
        for features, words, carrier, level in (
            ([Feature.MP_TABLE], "no MP table", None, Level.WARNING),
            (
                [Feature.MP_TABLE, Feature.CMDLINE_DEVICES],
                "no virtio-mmio devices from the command line and no MP table",
                "nitro",
                Level.ERROR,
            ),
        )
    ),
    *(
        Case(
            "local-discovery",
            "kernel",
            f"enclave run tells it of its devices by {how}, which it does not know, {STRINGS}",
            kernel(feature, banner=banner),
            carrier=carrier,
            level=level,
        )
        for how, feature, banner, carrier, level in (
            ("cmdline", Feature.CMDLINE_DEVICES, "6.12.1-test (gentoo) #1", None, Level.WARNING),
            ("acpi", Feature.ACPI, "6.12.1-test (Debian) #1", "qemu", Level.ERROR),
        )
    ),
    Case(
        "module",
        "/modules/00-nsm.ko",
        "a module, and the kernel cannot load any",
        both(kernel(Feature.MODULES), boots(modules=(DIRECTORY, b""), **{"modules/00-nsm.ko": (FILE, module())})),
    ),
    Case(
        "module",
        "/modules/00-nsm.ko.xz",
        "starts with b'\\xfd7zX', expected a kernel module",
        boots(modules=(DIRECTORY, b""), **{"modules/00-nsm.ko.xz": (FILE, lzma.compress(module()))}),
    ),
    Case(
        "module",
        "/nsm.ko",
        "ELF machine 183, expected 62 (x86_64)",
        boots(**{"nsm.ko": (FILE, module(machine=183))}),
        nitro=True,
    ),
    Case(
        "module-version",
        "/nsm.ko",
        "made for kernel '4.14.256', this one is '6.12.1-test'",
        boots(**{"nsm.ko": (FILE, module(release="4.14.256"))}),
        nitro=True,
    ),
    # the command line
    Case("cmdline-long", "cmdline", "2048 bytes, the kernel takes 2047", sets(cmdline=CMDLINE.ljust(2048))),
    Case(
        "cmdline-long",
        "cmdline",
        "100 bytes, the kernel takes 99",
        both(kernel(cmdline_size=99), sets(cmdline=CMDLINE.ljust(100))),
    ),
    Case(
        "cmdline-room",
        "cmdline",
        "1793 of 2047 bytes: 254 are left for the devices, expected 255",
        sets(cmdline=CMDLINE.ljust(1793)),
    ),
    Case("cmdline-bytes", "cmdline", "byte 0x0a, expected printable ASCII", sets(cmdline=CMDLINE + b"\n")),
    Case(
        "cmdline-console",
        "cmdline",
        "no console=ttyS0: debug mode shows nothing",
        cmdline("console=tty0", without="console"),
    ),
    Case("cmdline-panic", "cmdline", "no panic=: an enclave that panics hangs", cmdline(without="panic=")),
    Case("cmdline-panic", "cmdline", "no panic=: an enclave that panics hangs", cmdline("panic=0")),
    Case("cmdline-insecure", "cmdline", "nokaslr: protections of the kernel are off", cmdline("nokaslr")),
    Case(
        "cmdline-insecure",
        "cmdline",
        "init=/bin/sh: a shell instead of an init",
        cmdline("init=/bin/sh"),
    ),
    *(
        Case("cmdline-debug", "cmdline", f"{word}: left over from debugging", cmdline(word))
        for word in ("debug", "loglevel=8", "ignore_loglevel", "earlyprintk=serial")
    ),
    Case("cmdline-trust-cpu", "cmdline", "no random.trust_cpu=", cmdline(without="random")),
    Case(
        "cmdline-root",
        "cmdline",
        "root=/dev/ram0: an enclave's root is its ramdisks",
        cmdline("root=/dev/ram0"),
    ),
]
