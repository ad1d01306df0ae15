# SPDX-License-Identifier: Apache-2.0
"""QEMU and the default guest kernel, from the mirror of the user's own distribution."""

from enclavekit.runtime.find import Kernel, Qemu, find_kernel, find_qemu
from enclavekit.runtime.install import Installed, Progress, Runtime, Stage

__all__ = ["Installed", "Kernel", "Progress", "Qemu", "Runtime", "Stage", "find_kernel", "find_qemu"]
