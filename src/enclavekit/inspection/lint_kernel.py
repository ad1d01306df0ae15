# SPDX-License-Identifier: Apache-2.0
"""Rules about the kernel, its drivers and modules, and its command line."""

from __future__ import annotations

import re
from collections.abc import Iterator

from enclavekit.codec.elf import MAGIC
from enclavekit.eif import Arch, Discovery
from enclavekit.errors import KernelError
from enclavekit.image.kernel_features import Answer, Feature
from enclavekit.image.modules import Module, parse_module
from enclavekit.inspection.file_system import Node, PathError, find, shown
from enclavekit.inspection.findings import Finding, Level, found
from enclavekit.inspection.layout import Layout
from enclavekit.inspection.subject import NITRO, Subject

MAX_MODULE_SIZE = 16 << 20
MAX_MODULES = 100

OLDEST_MAINTAINED = (5, 10)
"""As kernel.org has it in November 2026."""

MAX_CMDLINE_SIZE = 2047
"""linux: COMMAND_LINE_SIZE of x86 and arm64, less the NUL."""
DEVICES_ROOM = 255
"""A local machine appends less than this, EC2 about as much."""

_SHELLS = ("sh", "bash", "ash", "dash", "busybox")
_INSECURE = ("nokaslr", "mitigations=off", "nosmep", "nosmap", "nopti", "nospectre_v1", "nospectre_v2", "pti=off")
_DEBUG = ("debug", "ignore_loglevel", "initcall_debug", "loglevel=7", "loglevel=8", "earlyprintk", "earlycon")
_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")


def kernel_rules(subject: Subject, layout: Layout) -> Iterator[Finding]:
    """All of them."""
    if subject.kernel_error:
        yield found("kernel", "kernel", subject.kernel_error.message, hint=subject.kernel_error.hint)
        return
    if subject.kernel_arch is not subject.image.arch:
        yield found(
            "kernel-architecture",
            "kernel",
            f"a kernel for {subject.kernel_arch}, the header says {subject.image.arch}",
            hint="nitro-cli takes its own machine's kernel for any image: build on the architecture that it is for",
        )
    modules, problems = _modules(subject, layout)
    yield from problems
    yield from _features(subject, layout, frozenset(module.name for module in modules))
    version = _VERSION.match(subject.features.release)
    if version and (int(version[1]), int(version[2])) < OLDEST_MAINTAINED:
        oldest = ".".join(map(str, OLDEST_MAINTAINED))
        yield found("kernel-old", "kernel", f"Linux {subject.features.release}, upstream maintains {oldest} and later")


def _features(subject: Subject, layout: Layout, modules: frozenset[str]) -> Iterator[Finding]:
    features = subject.features
    if features.trouble:
        yield found(
            "kernel-unread", "kernel", features.trouble.message.removeprefix("kernel: "), hint=features.trouble.hint
        )
        return

    def lacks(feature: Feature, module: str | None = None) -> bool:
        # An init that is not known may load modules from anywhere.
        may_be_loaded = module is not None and (module in modules or layout is Layout.UNKNOWN)
        return features.has(feature) is Answer.NO and not may_be_loaded

    source = f"going by its {features.learned_from.value}"
    if lacks(Feature.INITRAMFS):
        yield found("kernel-initramfs", "kernel", f"no support for ramdisks, {source}", hint="CONFIG_BLK_DEV_INITRD=y")
    if lacks(Feature.VIRTIO_MMIO, "virtio_mmio"):
        yield found("kernel-virtio", "kernel", f"no virtio-mmio driver, {source}", hint="CONFIG_VIRTIO_MMIO=y")
    if lacks(Feature.VSOCK, "vmw_vsock_virtio_transport"):
        yield found("kernel-vsock", "kernel", f"no virtio vsock driver, {source}", hint="CONFIG_VIRTIO_VSOCKETS=y")
    if lacks(Feature.NSM, "nsm"):
        hint = "CONFIG_NSM=y, in Linux 6.8 and later, or the module nsm.ko in the boot ramdisk"
        yield found("kernel-nsm", "kernel", f"no NSM driver, {source}", hint=hint)
    if lacks(Feature.SERIAL_CONSOLE):
        hint = "CONFIG_SERIAL_8250_CONSOLE=y"
        yield found("kernel-console", "kernel", f"no console on a serial port, {source}", hint=hint)
    if lacks(Feature.DEVTMPFS) and layout is not Layout.UNKNOWN:
        yield found("kernel-devtmpfs", "kernel", f"no devtmpfs, {source}", hint="CONFIG_DEVTMPFS=y")
    if subject.kernel_arch is Arch.X86_64 and subject.on_ec2:
        yield from _ec2_discovery(subject, source)
    if subject.discovery and subject.locally:
        yield from _local_discovery(subject, subject.discovery, source)


def _local_discovery(subject: Subject, discovery: Discovery, source: str) -> Iterator[Finding]:
    asks = {Discovery.CMDLINE: Feature.CMDLINE_DEVICES, Discovery.ACPI: Feature.ACPI}[discovery]
    if subject.features.has(asks) is Answer.NO:
        yield found(
            "local-discovery",
            "kernel",
            f"enclave run tells it of its devices by {discovery.value}, which it does not know, {source}",
            hint="build the image with enclave build, the kernel's configuration beside the kernel",
            level=None if subject.carrier is None else Level.ERROR,
        )


def _ec2_discovery(subject: Subject, source: str) -> Iterator[Finding]:
    lacking = [
        words
        for feature, words in (
            (Feature.CMDLINE_DEVICES, "no virtio-mmio devices from the command line"),
            (Feature.MP_TABLE, "no MP table"),
        )
        if subject.features.has(feature) is Answer.NO
    ]
    if lacking:
        yield found(
            "ec2-discovery",
            "kernel",
            f"{' and '.join(lacking)}, {source}: on EC2 it finds neither vsock nor NSM",
            hint="enclave kernel build makes one that finds both; Debian's kernels go by ACPI alone",
            level=Level.ERROR if subject.carrier == NITRO else None,
        )


def _modules(subject: Subject, layout: Layout) -> tuple[list[Module], list[Finding]]:
    """Those that init loads, and what is in the way of that."""
    modules: list[Module] = []
    problems: list[Finding] = []
    release = subject.bzimage.banner.partition(" ")[0] if subject.bzimage else subject.features.release
    for path, node in _module_files(subject, layout):
        where = "/" + shown(path)
        if subject.features.has(Feature.MODULES) is Answer.NO:
            problems.append(found("module", where, "a module, and the kernel cannot load any", hint="CONFIG_MODULES=y"))
            continue
        if node.size > MAX_MODULE_SIZE or not node.read_at(0, 4).startswith(MAGIC):
            problems.append(found("module", where, f"starts with {node.read_at(0, 4)!r}, expected a kernel module"))
            continue
        try:
            module = parse_module(node.read_at(0, MAX_MODULE_SIZE), where, subject.image.arch)
        except KernelError as error:
            problems.append(found("module", where, error.message.removeprefix(f"{where}: ")))
            continue
        if release and module.release != release:
            message = f"made for kernel {module.release[:100]!r}, this one is {release[:100]!r}"
            hint = "a kernel refuses it, unless both were built with CONFIG_MODVERSIONS and their symbols agree"
            problems.append(found("module-version", where, message, hint=hint))
        modules.append(module)
    return modules, problems


def _module_files(subject: Subject, layout: Layout) -> Iterator[tuple[bytes, Node]]:
    root = subject.files.root
    try:
        if layout is Layout.NITRO_CLI:
            yield b"nsm.ko", find(root, b"nsm.ko")
        elif layout is Layout.ENCLAVEKIT:
            directory = find(root, b"modules")
            for name in sorted(directory.children or {})[:MAX_MODULES]:
                if not name.startswith(b"."):
                    yield b"modules/" + name, find(root, name, start=directory)
    except PathError:
        return


def cmdline_rules(subject: Subject) -> Iterator[Finding]:
    """All of them."""
    where, words = "cmdline", subject.words
    limit = min(subject.bzimage.cmdline_size, MAX_CMDLINE_SIZE) if subject.bzimage else MAX_CMDLINE_SIZE
    size = len(subject.cmdline)
    if size > limit:
        yield found("cmdline-long", where, f"{size} bytes, the kernel takes {limit}")
    elif size > limit - DEVICES_ROOM:
        message = f"{size} of {limit} bytes: {limit - size} are left for the devices, expected {DEVICES_ROOM}"
        yield found("cmdline-room", where, message)
    odd = next((byte for byte in subject.cmdline if not 0x20 <= byte < 0x7F), None)
    if odd is not None:
        hint = "nitro-cli cuts spaces and newlines off; they are measured in PCR0 and PCR1"
        yield found("cmdline-bytes", where, f"byte 0x{odd:02x}, expected printable ASCII", hint=hint)
    if not any(word.startswith("console=ttyS") for word in words):
        yield found("cmdline-console", where, "no console=ttyS0: debug mode shows nothing", hint="console=ttyS0")
    panic = subject.parameter("panic") or subject.features.configuration.get("CONFIG_PANIC_TIMEOUT", "0")
    if panic == "0":
        yield found("cmdline-panic", where, "no panic=: an enclave that panics hangs", hint="panic=1, with reboot=k")
    yield from _leftovers(subject)
    if (
        subject.parameter("random.trust_cpu") is None
        and "CONFIG_RANDOM_TRUST_CPU" not in subject.features.configuration
    ):
        hint = "random.trust_cpu=on; Linux 5.19 and later trust the CPU by default"
        yield found("cmdline-trust-cpu", where, "no random.trust_cpu=", hint=hint)
    root = subject.parameter("root")
    if root is not None:
        yield found("cmdline-root", where, f"root={shown(root.encode())}: an enclave's root is its ramdisks")


def _leftovers(subject: Subject) -> Iterator[Finding]:
    for word in dict.fromkeys(subject.words):
        name, _, value = word.partition("=")
        if word in _INSECURE:
            yield found("cmdline-insecure", "cmdline", f"{word}: protections of the kernel are off")
        elif name in ("init", "rdinit") and value.split(",")[0].rpartition("/")[2] in _SHELLS:
            yield found("cmdline-insecure", "cmdline", f"{shown(word.encode())}: a shell instead of an init")
        elif word in _DEBUG or name in _DEBUG:
            yield found("cmdline-debug", "cmdline", f"{shown(word.encode())}: left over from debugging")
