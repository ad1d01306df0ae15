# SPDX-License-Identifier: Apache-2.0
"""The way of a kernel build, with a compiler that is a shell script: found again, told apart, cleaned up after."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from struct import pack_into

import pytest

from enclavekit.errors import FileError, KernelBuildError, RuntimeInstallError, UsageError
from enclavekit.kernel import build as build_module
from enclavekit.kernel.build import BuiltKernel, KernelRequest, build_kernel
from enclavekit.kernel.configuration import Target
from enclavekit.kernel.toolchain import HOST, LOADER, PARTS, TOOLS
from enclavekit.linux.locks import try_lock
from enclavekit.runtime import Installed, Progress, Runtime, Stage
from enclavekit.runtime.kernels import Kernels
from enclavekit.runtime.manifest import Component, Package

GIT_DATE = 1_700_000_000
LOADER_SCRIPT = """#!/bin/sh
# Stands for the dynamic loader: it is asked to run make, and does what make would.
for word in "$@"; do case "$word" in O=*) out=${word#O=} ;; esac; done
case "$*" in
*allnoconfig)
    cp "$KCONFIG_ALLCONFIG" "$out/.config"; sed -i '/=n$/d' "$out/.config"
    [ ! -e DIRECTORY/contradicts ] || sed -i /CONFIG_SMP/d "$out/.config" ;;
*bzImage)
    echo "  CC      a.o"
    env >DIRECTORY/environment
    [ ! -e DIRECTORY/hangs ] || { echo $$ >DIRECTORY/pid; echo "  CC      b.o"; exec sleep 600; }
    [ ! -e DIRECTORY/fails ] || { echo "a.c:1: error: expected a kernel"; exit 2; }
    mkdir -p "$out/arch/x86/boot" "$out/include/config"
    echo 6.12.1-enclave >"$out/include/config/kernel.release"
    cp DIRECTORY/bzimage "$out/arch/x86/boot/bzImage" ;;
esac
"""


def bzimage() -> bytes:
    data = bytearray(0x4000)
    data[0x1F1], data[0x211] = 1, 1
    data[0x202:0x206] = b"HdrS"
    pack_into("<H", data, 0x1FE, 0xAA55)
    pack_into("<H", data, 0x206, 0x20F)
    pack_into("<H", data, 0x20E, 0x100)
    pack_into("<I", data, 0x230, 0x200000)
    pack_into("<H", data, 0x236, 3)
    data[0x300:0x312] = b"6.12.1-enclave (a)"
    return bytes(data)


class FakeRuntime(Runtime):
    """Has a compiler and a source lying there; ``compiler_version`` may change."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.place = root
        self.compiler_version = "14.2.0-1"
        tree = root / "compiler"
        names = [f"usr/bin/{HOST}-{name}" for name in PARTS] + [f"usr/bin/{name}" for name in TOOLS]
        names += [f"usr/bin/{HOST}-gcc-14", *(f"usr/libexec/gcc/{HOST}/14/{name}" for name in ("cc1", "collect2"))]
        for name in names:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text("")
        loader = tree / LOADER
        loader.parent.mkdir(parents=True)
        loader.write_text(LOADER_SCRIPT.replace("DIRECTORY", str(root)))
        loader.chmod(0o755)
        (root / "bzimage").write_bytes(bzimage())
        self.source({"linux/Makefile": b"VERSION = 6\n", "linux/sound/core.c": b"int x;", "linux/sound/Kconfig": b""})

    def source(self, files: dict[str, bytes]) -> None:
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(data), GIT_DATE
                tar.addfile(member, io.BytesIO(data))
        path = self.place / "source/usr/src/linux-source-6.12.tar.xz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(made.getvalue(), preset=0))

    def install(self, report: object = None, want: Sequence[str] = (), *, newest: bool = False) -> list[Installed]:
        del report, newest
        if want[1] != "linux-source-6.12":
            raise RuntimeInstallError(f"apt-get download: unable to locate package {want[1]}")
        versions = {want[0]: ("compiler", self.compiler_version), want[1]: ("source", "6.12.1-1")}
        return [
            Installed(
                Component(name, version, name, "trixie", "", (Package(name, version, 1, "0" * 64),)),
                self.place / directory,
                True,
            )
            for name, (directory, version) in versions.items()
        ]


class Builder:
    def __init__(self, tmp_path: Path) -> None:
        self.runtime = FakeRuntime(tmp_path / "runtime")
        self.kernels = Kernels(tmp_path / "kernels", tmp_path / "nothing")
        self.cache = tmp_path / "cache"
        self.told: list[Progress] = []

    def __call__(
        self,
        *fragments: str,
        name: str | None = None,
        version: str = "6.12",
        report: Callable[[Progress], None] | None = None,
    ) -> BuiltKernel:
        return build_kernel(
            KernelRequest(version, Target.X86_64, fragments, name),
            runtime=self.runtime,
            kernels=self.kernels,
            cache=self.cache,
            report=report or self.told.append,
        )

    def left(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir() if path.name != "lock")


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    monkeypatch.setattr(build_module, "SPACE", 0)
    return Builder(tmp_path)


def test_a_kernel_is_built_once_and_then_found(builder: Builder) -> None:
    first = builder()
    assert first.seconds is not None
    assert (first.kernel.name, first.kernel.origin, first.kernel.version) == (
        "6.12.1-enclave", "built", "6.12.1-enclave",
    )  # fmt: skip
    assert first.kernel.path.read_bytes() == bzimage()
    assert "CONFIG_VSOCKETS=y" in first.kernel.path.with_name("kernel.config").read_text().splitlines()
    assert first.kernel.made["compiler"] == "14.2.0-1"
    assert builder.left() == []
    again = builder()
    assert (again.kernel, again.seconds) == (first.kernel, None)


def test_other_inputs_are_another_kernel(builder: Builder, tmp_path: Path) -> None:
    names = {builder().kernel.name, builder("netfilter").kernel.name, builder(name="mine").kernel.name}
    builder.runtime.compiler_version = "14.2.0-2"
    names.add(builder().kernel.name)
    assert len(names) == 4
    assert {"6.12.1-enclave", "mine"} < names
    assert builder().seconds is None


def test_time_user_and_host_are_pinned_and_nothing_of_the_callers_environment_counts(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCFLAGS", "-O3")
    builder()
    lines = (builder.runtime.place / "environment").read_text().splitlines()
    assert "KBUILD_BUILD_TIMESTAMP=Tue Nov 14 22:13:20 UTC 2023" in lines
    assert {"KBUILD_BUILD_USER=enclavekit", "KBUILD_BUILD_HOST=enclavekit", "KBUILD_BUILD_VERSION=1"} < set(lines)
    assert not any(line.startswith("KCFLAGS") for line in lines)


def test_a_build_that_fails_says_what_failed_and_leaves_its_log(builder: Builder) -> None:
    (builder.runtime.place / "fails").touch()
    with pytest.raises(KernelBuildError) as failed:
        builder()
    assert str(failed.value) == "make bzImage: a.c:1: error: expected a kernel"
    assert failed.value.hint == f"all that it said is in {builder.cache / 'failed.log'}"
    assert builder.left() == ["failed.log"]
    assert builder.kernels.all() == []


def test_an_interruption_ends_the_build_and_leaves_nothing(builder: Builder) -> None:
    (builder.runtime.place / "hangs").touch()
    pid_file = builder.runtime.place / "pid"

    def interrupt(progress: Progress) -> None:
        if progress.stage is Stage.COMPILE:
            while not pid_file.exists() or not pid_file.read_text().endswith("\n"):
                os.sched_yield()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builder(report=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert builder.left() == []
    assert builder.kernels.all() == []


def test_a_second_build_waits_for_the_first(builder: Builder) -> None:
    builder.cache.mkdir()
    fd = try_lock(builder.cache / "lock")
    assert fd is not None
    waits = threading.Event()
    built: list[BuiltKernel] = []

    def work() -> None:
        built.append(builder(report=lambda progress: waits.set() if progress.stage is Stage.WAITING else None))

    thread = threading.Thread(target=work)
    thread.start()
    assert waits.wait(60)
    assert built == []
    os.close(fd)
    thread.join()
    assert built[0].seconds is not None


def test_options_that_the_source_does_not_take_are_told(builder: Builder) -> None:
    (builder.runtime.place / "contradicts").touch()
    with pytest.raises(KernelBuildError, match="configuration: CONFIG_SMP is not set, expected y \\(base\\)"):
        builder()
    assert builder.left() == []


def test_a_name_that_is_taken_is_refused_before_anything_is_built(builder: Builder) -> None:
    builder.kernels.add(builder.runtime.place / "bzimage", name="mine", modules=None, config=None)
    with pytest.raises(UsageError, match="kernel mine: there is another one of that name"):
        builder(name="mine")
    assert builder.told == []


def test_a_version_that_the_mirror_has_not(builder: Builder) -> None:
    with pytest.raises(KernelBuildError, match=r"this system's mirror lacks linux-source-9\.9"):
        builder(version="9.9")


@pytest.mark.parametrize("version", ["6", "../6.12", "6.12 -o x", ""])
def test_a_version_is_two_numbers(builder: Builder, version: str) -> None:
    with pytest.raises(KernelBuildError, match=r"expected one like 6\.12"):
        builder(version=version)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"linux/COPYING": b""}, "no Makefile, expected the source of Linux"),
        ({"linux/Makefile": b"", "linux/../../out": b""}, "out"),
    ],
)
def test_a_source_that_is_none(builder: Builder, files: dict[str, bytes], words: str) -> None:
    """No Makefile; a name that leads out, which is not written."""
    builder.runtime.source(files)
    with pytest.raises(KernelBuildError, match=words):
        builder()
    assert builder.left() == []
    assert not (builder.cache.parent / "out").exists()


def test_a_disk_that_is_too_full(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "SPACE", 1 << 62)
    with pytest.raises(FileError, match=r"MiB free, need [0-9]+ MiB to build a kernel"):
        builder()
    assert builder.left() == []


def test_a_source_that_is_cut_off(builder: Builder) -> None:
    path = builder.runtime.place / "source/usr/src/linux-source-6.12.tar.xz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(KernelBuildError, match=r"linux-source-6\.12\.tar\.xz: "):
        builder()
    assert builder.left() == []


def test_a_compiler_that_lacks_a_program(builder: Builder) -> None:
    (builder.runtime.place / "compiler/usr/bin/flex").unlink()
    with pytest.raises(KernelBuildError, match="compiler: no usr/bin/flex in the packages"):
        builder()
    assert builder.left() == []


def test_what_no_enclave_needs_is_not_unpacked(builder: Builder, tmp_path: Path) -> None:
    from enclavekit.kernel.source import unpack

    date = unpack(builder.runtime.place / "source", tmp_path / "linux", lambda part: None)
    assert date.timestamp() == GIT_DATE
    names = sorted(str(path.relative_to(tmp_path / "linux")) for path in (tmp_path / "linux").rglob("*"))
    assert names == ["Makefile", "sound", "sound/Kconfig"]
