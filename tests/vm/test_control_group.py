# SPDX-License-Identifier: Apache-2.0
"""Control groups on a kernel that has them: a guest's, in which our module runs."""

from __future__ import annotations

import inspect
from pathlib import Path

from conftest import Enclave

from enclavekit import errors
from enclavekit.linux import cgroup

SCRIPT = """
import ctypes, os, signal, sys, types
package = types.ModuleType("enclavekit"); package.__path__ = []
sys.modules["enclavekit"] = package
for name, source in (("enclavekit.errors", {errors!r}), ("cgroup", {cgroup!r})):
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
from pathlib import Path
from cgroup import Cgroup
parent = Path("/tmp/groups")
parent.mkdir()
assert ctypes.CDLL(None).mount(b"none", bytes(parent), b"cgroup2", 0, None) == 0
try:
    Cgroup(parent / "early", memory=1, cpus=1)
except Exception as error:
    print(type(error).__name__, [path.name for path in parent.iterdir() if path.is_dir()], error.hint)
(parent / "cgroup.subtree_control").write_text("+memory +cpu")
group = Cgroup(parent / "one", memory=32 << 20, cpus=2)
print((group.path / "memory.max").read_text().strip(), (group.path / "cpu.max").read_text().strip())
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.read(read, 1)
    bytearray(os.urandom(64 << 20))
    os._exit(0)
group.add(child)
print("before", group.out_of_memory)
os.write(write, b"x")
_, status = os.waitpid(child, 0)
print("after", group.out_of_memory, os.WTERMSIG(status) == signal.SIGKILL)
group.remove()
print(group.path.exists())
"""


def test_a_group_limits_and_goes(enclave: Enclave, layout: Path) -> None:
    script = SCRIPT.format(errors=inspect.getsource(errors), cgroup=inspect.getsource(cgroup))
    done = enclave(
        *("run", f"oci:{layout}", "--logs", "--user", "root", "--memory", "512M"),
        *("--entrypoint", "python3 -c", "--", script),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.splitlines() == [
        "LaunchError [] echo '+memory +cpu' > /tmp/groups/cgroup.subtree_control",
        "33554432 200000 100000",
        "before False",
        "after True True",
        "False",
    ]
