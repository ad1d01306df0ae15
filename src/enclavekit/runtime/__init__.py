# SPDX-License-Identifier: Apache-2.0
"""QEMU and the default guest kernel, taken from the user's own distribution."""

from enclavekit.runtime.apt import Progress
from enclavekit.runtime.runtime import Kernel, Qemu, Runtime, find_kernel, find_qemu

__all__ = ["Kernel", "Progress", "Qemu", "Runtime", "find_kernel", "find_qemu"]
