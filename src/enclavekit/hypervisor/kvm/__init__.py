# SPDX-License-Identifier: Apache-2.0
"""Carrier ``kvm``: a monitor of our own on bare /dev/kvm, no QEMU."""

from enclavekit.hypervisor.kvm.carrier import KvmCarrier

__all__ = ["KvmCarrier"]
