# SPDX-License-Identifier: Apache-2.0
"""A child that dies with its parent, however that ends."""

from __future__ import annotations

import os
import select
import subprocess
import sys

PARENT = """
import subprocess
from enclavekit.linux.process import dies_with_parent
child = subprocess.Popen(["sleep", "60"], preexec_fn=dies_with_parent())
print(child.pid, flush=True)
child.wait()
"""


def test_a_killed_parent_takes_its_child_along() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert select.select([child], [], [], 0)[0] == []
            parent.kill()
            assert select.select([child], [], [], 10)[0] == [child]
        finally:
            os.close(child)
