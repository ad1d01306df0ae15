# SPDX-License-Identifier: Apache-2.0
"""What the virtual-machine tier stands on: the installed runtime, a root filesystem, the ``enclave`` program."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from enclavekit.environment import data_directory
from enclavekit.runtime import Runtime

HERE = Path(__file__).parent
ENCLAVE = Path(sys.executable).with_name("enclave")
TIMEOUT_S = 100
LAYOUT_PROGRAMS = ("curl", "mmdebstrap", "socat", "umoci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vm)


@pytest.fixture(scope="session", autouse=True)
def _runtime() -> None:
    """This tier is skipped by name where there is no runtime; where it must run, that is a failure."""
    usable = {item.component.name for item in Runtime(data_directory() / "runtime").show() if item.usable}
    if not usable.issuperset({"qemu", "kernel"}):
        if os.environ.get("CI"):
            pytest.fail("the runtime is not installed: the virtual-machine tier must not be skipped here")
        pytest.skip("virtual machines: the runtime is not installed (enclave runtime install)")


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """busybox, an ordinary user, and vsock from inside."""
    script = HERE.parents[1] / "examples/hello/make_rootfs.py"
    spec = importlib.util.spec_from_file_location("make_rootfs", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp("rootfs") / "root"
    module.make_rootfs(root, Runtime(data_directory() / "runtime").install_package("busybox-static"))
    subprocess.run(
        [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-musl", "-Os", "-static", "-s", "-o",
         root / "bin/vsock", HERE / "guest/vsock.c"],
        check=True,
    )  # fmt: skip
    return root


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian with a Python web service: examples/web."""
    missing = [name for name in LAYOUT_PROGRAMS if shutil.which(name) is None]
    if missing:
        if os.environ.get("CI"):
            pytest.fail(f"not installed: {', '.join(missing)}")
        pytest.skip(f"not installed: {', '.join(missing)}")
    script = HERE.parents[1] / "examples/web/make_layout.py"
    spec = importlib.util.spec_from_file_location("make_layout", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = tmp_path_factory.mktemp("web") / "layout"
    module.make_layout(made)
    return made


@pytest.fixture(scope="session")
def _built_kernel(request: pytest.FixtureRequest) -> dict[str, object]:
    """Our own kernel: the one that was built before, else it is built now, which takes minutes and is said."""
    terminal = request.config.pluginmanager.getplugin("terminalreporter")
    listed = subprocess.run([ENCLAVE, "kernel", "list", "--json"], capture_output=True, check=True)
    if terminal and not any(one["origin"] == "built" for one in json.loads(listed.stdout)["kernels"]):
        terminal.write_line("\nno kernel of ours is built yet: building one (enclave kernel build)")
    done = subprocess.run([ENCLAVE, "kernel", "build", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built: dict[str, object] = json.loads(done.stdout)
    if terminal and not built["cached"]:
        terminal.write_line(f"\nthe kernel was built now: {done.stderr.splitlines()[-2]}")
    kernel = built["kernel"]
    assert isinstance(kernel, dict)
    return kernel


@pytest.fixture(scope="session")
def small_kernel(_built_kernel: dict[str, object]) -> Path:
    """Our own kernel's file."""
    return Path(str(_built_kernel["path"]))


@pytest.fixture(scope="session")
def small_kernel_name(_built_kernel: dict[str, object]) -> str:
    """Its name, for ``--kernel``."""
    return str(_built_kernel["name"])


@dataclass(frozen=True)
class Enclave:
    """The program, with a runtime directory of the test's own."""

    home: Path

    @property
    def directory(self) -> Path:
        return self.home / "enclavekit"

    def environment(self) -> dict[str, str]:
        """These tests look at QEMU's processes, so where KVM is fast it is not to be taken without QEMU."""
        return {"ENCLAVEKIT_CARRIER": "qemu", **os.environ, "XDG_RUNTIME_DIR": str(self.home)}

    def __call__(self, *words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            [ENCLAVE, *words],
            capture_output=True, text=True, errors="surrogateescape", timeout=TIMEOUT_S,
            env=self.environment(), stdin=subprocess.DEVNULL, check=False, **options,
        )  # fmt: skip

    def words(self, *words: str | Path) -> list[str | Path]:
        """Its command line."""
        return [ENCLAVE, *words]

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        """In the background, with unbuffered pipes."""
        return subprocess.Popen(
            [ENCLAVE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, bufsize=0,
            env=self.environment(),
        )  # fmt: skip

    def left(self) -> list[str]:
        """Directories of enclaves that are still there."""
        if not self.directory.exists():
            return []
        return sorted(path.name for path in self.directory.iterdir() if path.name not in ("lock", "parent", "ended"))


@pytest.fixture
def enclave(tmp_path: Path) -> Enclave:
    return Enclave(tmp_path)


def qemu_of(pid: int) -> list[int]:
    """The QEMU processes that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            command = path.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == pid and b"qemu-system" in command:
            found.append(int(path.parent.name))
    return found


def stop(process: subprocess.Popen[bytes]) -> None:
    """For the end of a test, whatever happened in it."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
