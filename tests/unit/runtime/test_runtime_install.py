# SPDX-License-Identifier: Apache-2.0
"""Installing the runtime from a fake mirror through fake apt programs."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_system import KERNEL, LIBRARIES, FakeSystem

from enclavekit.errors import Error, FileError, OfflineError, RuntimeInstallError, UnsupportedHostError
from enclavekit.linux.locks import try_lock
from enclavekit.runtime.distribution import BY_HAND, COMPILERS
from enclavekit.runtime.find import find_kernel, find_qemu
from enclavekit.runtime.install import Progress, Runtime, Stage


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    directory = tmp_path / "system"
    directory.mkdir()
    return FakeSystem(directory)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data" / "runtime"


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def failure(system: FakeSystem, root: Path, want: tuple[str, ...] = ("qemu", "kernel"), **changes: Any) -> Error:
    with pytest.raises(Error) as caught:
        Runtime(root, system.host(**changes)).install(want=want)
    return caught.value


def test_install_lays_what_is_needed_and_nothing_else(system: FakeSystem, root: Path) -> None:
    installed = Runtime(root, system.host()).install()
    assert [(item.component.name, item.component.version, item.usable) for item in installed] == [
        ("kernel", KERNEL, True),
        ("qemu", "11.1.3", True),
    ]
    assert files(root) - {"manifest.json", "lock"} == {
        "qemu-11.1.3/usr/bin/qemu-system-x86_64",
        f"qemu-11.1.3/{LIBRARIES}/ld-linux-x86-64.so.2",
        f"qemu-11.1.3/{LIBRARIES}/qemu/module.so",
        "qemu-11.1.3/usr/share/qemu/qboot.rom",
        "qemu-11.1.3/usr/share/seabios/bios.bin",
        f"kernel-{KERNEL}/boot/vmlinuz-{KERNEL}",
        f"kernel-{KERNEL}/boot/config-{KERNEL}",
        f"kernel-{KERNEL}/usr/lib/modules/{KERNEL}/kernel/vsock.ko.xz",
    }
    assert not (root / "apt").exists()
    assert not (root / "staging").exists()
    assert find_qemu(root).version == (11, 1, 3)
    assert find_kernel(root).modules == root / f"kernel-{KERNEL}/usr/lib/modules/{KERNEL}"


def test_apt_is_called_with_backports_for_qemu_only(system: FakeSystem, root: Path) -> None:
    Runtime(root, system.host()).install()
    calls = [call for call in system.calls() if not call.startswith("dpkg-deb")]
    assert [re.sub(r" http.*", " …", call) for call in calls] == [
        "apt-get update",
        "apt-get --print-uris -t trixie-backports install qemu-system-x86",
        "apt-helper download-file …",
        "apt-cache show --no-all-versions linux-image-cloud-amd64",
        f"apt-cache show --no-all-versions linux-image-{KERNEL}",
        f"apt-get --print-uris download linux-image-{KERNEL} linux-modules-{KERNEL}",
        "apt-helper download-file …",
    ]


def test_manifest_names_every_package(system: FakeSystem, root: Path) -> None:
    Runtime(root, system.host()).install(want=["qemu"])
    component = json.loads((root / "manifest.json").read_text())["components"]["qemu"]
    assert component["suite"] == "trixie-backports"
    assert [(package["name"], package["version"]) for package in component["packages"]] == [
        ("libc6", "2.41-12+deb13u5"),
        ("qemu-system-x86", "1:11.1.3+ds-1~bpo13+1"),
        ("seabios", "1.16"),
    ]
    content = json.dumps(system.world["packages"]["libc6"]["files"]).encode()
    assert component["packages"][0]["sha256"] == hashlib.sha256(content).hexdigest()
    assert component["packages"][0]["size"] == len(content)


def test_what_is_installed_is_not_fetched_again(system: FakeSystem, root: Path) -> None:
    Runtime(root, system.host()).install()
    before = system.calls()
    Runtime(root, system.host()).install()
    assert system.calls() == before


def test_what_has_gone_is_fetched_again(system: FakeSystem, root: Path) -> None:
    runtime = Runtime(root, system.host())
    runtime.install()
    (root / "qemu-11.1.3/usr/bin/qemu-system-x86_64").unlink()
    assert [item.usable for item in runtime.show()] == [True, False]
    assert [item.usable for item in runtime.install()] == [True, True]
    assert len([call for call in system.calls() if call.startswith("apt-helper")]) == 3


def test_package_is_unpacked_whole_and_works_again_with_no_network(system: FakeSystem, root: Path) -> None:
    path = Runtime(root, system.host()).install_package("busybox-static")
    assert path == root / "busybox-static-1.1.37.0-6+b9"
    assert files(path) == {"usr/bin/busybox"}
    system.world["failures"] = {"apt-": "E: no network in this test"}
    assert Runtime(root, system.host()).install_package("busybox-static") == path


def test_progress(system: FakeSystem, root: Path) -> None:
    seen: list[Progress] = []
    Runtime(root, system.host()).install(seen.append, want=["busybox-static"])
    text = "busybox-static: 1 package, 0.0 MB"
    lists = Progress(Stage.LISTS, "http://mirror.example.org/debian", 0.0)
    assert seen == [
        lists,
        Progress(Stage.LISTS, lists.text, 0.5),
        Progress(Stage.LISTS, lists.text, 1.0),
        Progress(Stage.DOWNLOAD, text, 0.5),
        Progress(Stage.DOWNLOAD, text, 1.0),
        Progress(Stage.UNPACK, text, 0.0),
        Progress(Stage.UNPACK, text, 1.0),
    ]


def test_second_install_waits_for_the_first(system: FakeSystem, root: Path) -> None:
    root.mkdir(parents=True)
    fd = try_lock(root / "lock")
    assert fd is not None
    seen: queue.Queue[Progress] = queue.Queue()
    thread = threading.Thread(target=Runtime(root, system.host()).install, args=(seen.put, ["busybox-static"]))
    thread.start()
    try:
        first = seen.get(timeout=30)
        assert first == Progress(Stage.WAITING, "another enclave command is changing the runtime")
        assert system.calls() == []
    finally:
        os.close(fd)
        thread.join(30)
    assert (root / "manifest.json").exists()


def test_interruption_leaves_only_what_was_fetched(system: FakeSystem, root: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.stage is Stage.UNPACK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runtime(root, system.host()).install(interrupt, want=["busybox-static"])
    assert {path.name for path in root.iterdir()} == {"apt", "lock"}
    assert [path.name for path in (root / "apt").iterdir()] == ["archives"]
    Runtime(root, system.host()).install(want=["busybox-static"])
    assert len([call for call in system.calls() if call.startswith("apt-helper")]) == 1


def test_apt_is_ended_when_we_are_interrupted(system: FakeSystem, root: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.fraction == 1.0 and (system.directory / "pid").exists():
            raise KeyboardInterrupt

    system.world["hangs"] = "apt-get update"
    with pytest.raises(KeyboardInterrupt):
        Runtime(root, system.host(free_space=lambda _: 1 << 40)).install(interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((system.directory / "pid").read_text()), 0)


def test_staging_of_a_dead_install_is_swept(system: FakeSystem, root: Path) -> None:
    (root / "staging/whole").mkdir(parents=True)
    Runtime(root, system.host()).install(want=["busybox-static"])
    assert not (root / "staging").exists()


def test_failure_of_one_keeps_the_other(system: FakeSystem, root: Path) -> None:
    system.world["failures"] = {"apt-cache": "E: broken"}
    error = failure(system, root)
    assert (type(error), str(error)) == (RuntimeInstallError, "apt-cache show: broken")
    assert [item.component.name for item in Runtime(root, system.host()).show()] == ["qemu"]


def test_remove_takes_all_away_even_what_is_damaged(system: FakeSystem, root: Path) -> None:
    runtime = Runtime(root, system.host())
    runtime.remove()
    assert not root.exists()
    runtime.install()
    (root / "manifest.json").write_text("{")
    runtime.remove()
    assert [path.name for path in root.iterdir()] == ["lock"]
    assert runtime.show() == []


def test_configuration_checks_signatures_and_runs_no_hooks(system: FakeSystem, root: Path) -> None:
    system.world["hangs"] = "apt-get update"
    seen = {}

    def look(progress: Progress) -> None:
        if (system.directory / "pid").exists():
            seen["conf"] = (root / "apt/apt.conf").read_text()
            seen["sources"] = (root / "apt/sources/mirror.sources").read_text()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runtime(root, system.host()).install(look)
    for line in (
        "#clear APT::Update;",
        "#clear DPkg::Post-Invoke;",
        'APT::Get::AllowUnauthenticated "false";',
        'Acquire::AllowInsecureRepositories "false";',
        'Dir::Etc::preferences "/dev/null";',
        f'Dir::State::lists "{root}/apt/lists";',
    ):
        assert line in seen["conf"].splitlines()
    assert seen["sources"] == (
        "Types: deb\nURIs: http://mirror.example.org/debian\nSuites: trixie trixie-backports\nComponents: main\n"
        "Architectures: amd64\nTargets: Packages\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )


# Failures, each by its words.


def test_other_architecture(system: FakeSystem, root: Path) -> None:
    error = failure(system, root, machine="aarch64")
    assert type(error) is UnsupportedHostError
    assert str(error) == "the runtime cannot be installed on aarch64: expected x86_64"


def test_no_apt(system: FakeSystem, root: Path) -> None:
    error = failure(system, root, apt_get=Path("/nowhere/apt-get"))
    assert type(error) is UnsupportedHostError
    assert str(error) == "the runtime cannot be installed without apt: /nowhere/apt-get does not exist"
    assert error.hint == BY_HAND


def test_other_distribution(system: FakeSystem, root: Path) -> None:
    (system.directory / "os-release").write_text('ID=other\nPRETTY_NAME="Other 1"\n')
    error = failure(system, root)
    assert type(error) is UnsupportedHostError
    assert str(error) == "the runtime cannot be installed on Other 1: expected Debian or Ubuntu"
    assert error.hint == BY_HAND


def test_no_source(system: FakeSystem, root: Path) -> None:
    (system.directory / "etc/sources.list.d/debian.sources").unlink()
    error = failure(system, root)
    assert type(error) is UnsupportedHostError
    assert str(error) == (f"{system.directory}/etc: apt has no source with the component main of a suite of Debian 12")
    assert error.hint == f"add one (sources.list(5)), or {BY_HAND}"


def test_path_that_apt_cannot_take(system: FakeSystem, tmp_path: Path) -> None:
    error = failure(system, tmp_path / "a:b")
    assert type(error) is RuntimeInstallError
    assert str(error) == f"{tmp_path}/a:b: holds ':', which apt or the dynamic loader cannot take in a path"
    assert error.hint == "set XDG_DATA_HOME to another directory"


@pytest.mark.parametrize(
    ("said", "kind", "message", "hint"),
    [
        (
            "E: Failed to fetch http://mirror.example.org/x  Temporary failure resolving 'mirror.example.org'\n"
            "E: Some index files failed to download.",
            OfflineError,
            "apt-get update: failed to fetch http://mirror.example.org/x Temporary failure resolving "
            "'mirror.example.org'",
            "connect this machine to its package mirror, then try again",
        ),
        (
            "W: GPG error\nE: Failed to fetch http://mirror.example.org/x  The following signatures couldn't be "
            "verified because the public key is not available: NO_PUBKEY 01\nE: Some index files failed to download.",
            RuntimeInstallError,
            "apt-get update: failed to fetch http://mirror.example.org/x The following signatures couldn't be verified "
            "because the public key is not available: NO_PUBKEY 01",
            "the keyring is missing or too old: upgrade the package that holds "
            "/usr/share/keyrings/debian-archive-keyring.gpg",
        ),
        (
            "E: The repository 'http://mirror.example.org trixie Release' does not have a Release file.",
            RuntimeInstallError,
            "apt-get update: the repository 'http://mirror.example.org trixie Release' does not have a Release file",
            None,
        ),
        ("", RuntimeInstallError, "apt-get update: failed", None),
    ],
)
def test_apt_fails(system: FakeSystem, root: Path, said: str, kind: type, message: str, hint: str | None) -> None:
    system.world["failures"] = {"apt-get update": said}
    error = failure(system, root)
    assert (type(error), str(error), error.hint) == (kind, message, hint)
    assert [path.name for path in root.iterdir()] == ["lock"]


def test_apt_meets_a_full_disk(system: FakeSystem, root: Path) -> None:
    system.world["failures"] = {"apt-get update": "E: write error - write (28: No space left on device)"}
    error = failure(system, root)
    assert (type(error), str(error)) == (FileError, f"{root}/apt: disk full")


def test_disk_fills_while_apt_waits(system: FakeSystem, root: Path) -> None:
    system.world["hangs"] = "apt-get update"
    error = failure(system, root, free_space=lambda _: 0 if (system.directory / "pid").exists() else 1 << 40)
    assert (type(error), str(error)) == (FileError, f"{root}/apt: disk full")
    assert [path.name for path in root.iterdir()] == ["lock"]


def test_too_little_space(system: FakeSystem, root: Path) -> None:
    error = failure(system, root, free_space=lambda _: 20 << 20)
    assert (type(error), str(error)) == (FileError, f"{root}: 20 MiB free, need 150 MiB")
    assert error.hint == "make room, or set XDG_DATA_HOME to a directory that has it"


def test_directory_cannot_be_made(system: FakeSystem, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = failure(system, tmp_path / "file/runtime")
    assert (type(error), str(error)) == (FileError, f"cannot write {tmp_path}/file/runtime: not a directory")


def test_unknown_package(system: FakeSystem, root: Path) -> None:
    error = failure(system, root, want=("nothing",))
    assert (type(error), str(error)) == (RuntimeInstallError, "apt-get: says nothing about the package nothing")


def test_corrupt_package(system: FakeSystem, root: Path) -> None:
    system.world["corrupt"] = ["busybox-static"]
    error = failure(system, root, want=("busybox-static",))
    expected = hashlib.sha256(json.dumps(system.world["packages"]["busybox-static"]["files"]).encode()).hexdigest()
    got = hashlib.sha256(b"{}").hexdigest()
    assert (type(error), str(error)) == (RuntimeInstallError, f"busybox-static: SHA-256 {got}, expected {expected}")
    assert error.hint == "try again"


def test_package_cannot_be_unpacked(system: FakeSystem, root: Path) -> None:
    system.world["failures"] = {"dpkg-deb": "dpkg-deb: error:\n  bad archive"}
    error = failure(system, root, want=("busybox-static",))
    assert type(error) is RuntimeInstallError
    assert str(error) == "busybox-static: cannot be unpacked: dpkg-deb: error: bad archive"


def test_unpacking_meets_a_full_disk(system: FakeSystem, root: Path) -> None:
    system.world["failures"] = {"dpkg-deb": "tar: write error: No space left on device"}
    error = failure(system, root, want=("busybox-static",))
    assert (type(error), str(error)) == (FileError, f"{root}/staging/whole: disk full")


def test_no_kernel_behind_the_name(system: FakeSystem, root: Path) -> None:
    system.world["packages"]["linux-image-cloud-amd64"]["depends"] = ["kmod"]
    error = failure(system, root, want=("kernel",))
    assert (type(error), str(error)) == (RuntimeInstallError, "linux-image-cloud-amd64: depends on no kernel")


def test_kernel_without_modules(system: FakeSystem, root: Path) -> None:
    system.world["packages"][f"linux-modules-{KERNEL}"]["files"] = {}
    error = failure(system, root, want=("kernel",))
    assert type(error) is RuntimeInstallError
    assert str(error) == "kernel: the packages hold 1 kernels, expected one and its modules"


def test_packages_without_qemu(system: FakeSystem, root: Path) -> None:
    del system.world["packages"]["qemu-system-x86"]["files"]["usr/bin/qemu-system-x86_64"]
    error = failure(system, root, want=("qemu",))
    assert (type(error), str(error)) == (RuntimeInstallError, "qemu: the packages hold no qemu-system-x86_64")


def set_loader(system: FakeSystem, text: str) -> None:
    system.world["packages"]["libc6"]["files"][f"{LIBRARIES}/ld-linux-x86-64.so.2"] = [0o755, text]


def test_mirror_with_an_old_qemu(system: FakeSystem, root: Path) -> None:
    set_loader(system, "#!/bin/sh\necho QEMU emulator version 10.0.2\n")
    error = failure(system, root, want=("qemu",))
    assert type(error) is RuntimeInstallError
    assert str(error) == "qemu: the mirror has 10.0.2, expected 10.2 or newer"
    assert error.hint == BY_HAND
    assert Runtime(root, system.host()).show() == []


def test_qemu_that_does_not_run(system: FakeSystem, root: Path) -> None:
    set_loader(system, "#!/bin/sh\necho cannot open shared object file\n")
    error = failure(system, root, want=("qemu",))
    assert type(error) is RuntimeInstallError
    assert str(error) == (
        f"qemu: does not run here: {root}/staging/chosen/{LIBRARIES}/ld-linux-x86-64.so.2: --version says "
        "'cannot open shared object file', expected QEMU emulator version"
    )


def compiler(system: FakeSystem, version: str) -> None:
    """Put one on the mirror."""
    for name in COMPILERS["compiler"]:
        system.world["packages"][name] = {"version": "1", "files": {f"usr/bin/{name}": [0o755, name]}}
    system.world["packages"]["gcc"]["depends"] = ["gcc-14", "libc6"]
    system.world["packages"]["gcc-14"] = {"version": version, "files": {"usr/bin/gcc-14": [0o755, version]}}


def test_a_compiler_comes_with_all_that_it_depends_on(system: FakeSystem, root: Path) -> None:
    compiler(system, "14.2.0-19")
    component = Runtime(root, system.host()).install(want=["compiler"])[0].component
    assert (component.version, component.suite, component.directory) == ("14.2.0-19", "trixie", "compiler-14.2.0-19")
    assert {package.name for package in component.packages} == {*COMPILERS["compiler"], "gcc-14", "libc6"}
    assert "usr/bin/gcc-14" in files(root / component.directory)
    assert "apt-get --print-uris -t trixie install base-files" in "\n".join(system.calls())


def test_the_newest_takes_the_place_of_what_is_there(system: FakeSystem, root: Path) -> None:
    compiler(system, "14.2.0-19")
    Runtime(root, system.host()).install(want=["compiler"])
    fetched = sum(call.startswith("apt-helper") for call in system.calls())
    same = Runtime(root, system.host()).install(want=["compiler"], newest=True)[0]
    assert same.component.version == "14.2.0-19"
    assert sum(call.startswith("apt-helper") for call in system.calls()) == fetched
    compiler(system, "14.2.0-20")
    assert Runtime(root, system.host()).install(want=["compiler"])[0].component.version == "14.2.0-19"
    newer = Runtime(root, system.host()).install(want=["compiler"], newest=True)[0]
    assert (newer.component.version, newer.usable) == ("14.2.0-20", True)
    assert sorted(path.name for path in root.iterdir()) == ["compiler-14.2.0-20", "lock", "manifest.json"]
