# SPDX-License-Identifier: Apache-2.0
"""The metadata section: JSON with upstream's keys, and what we say of the kernel. Not measured: trust none of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from enclavekit.codec import bzimage
from enclavekit.errors import EifError

PAGE = 4096
DISTRIBUTION_KERNELS = ("debian", "ubuntu")
"""Words in the banner of kernels that find virtio-mmio devices by ACPI only."""


class Discovery(StrEnum):
    """How a kernel learns of its virtio-mmio devices."""

    ACPI = "acpi"
    """From ACPI's LNRO0005 devices: Debian's kernels."""
    CMDLINE = "cmdline"
    """From its command line; CPUs and interrupts from the MP table: kernels made for enclaves."""


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """Which kernel the image was built with."""

    name: str
    sha384: str
    discovery: Discovery

    def as_dict(self) -> dict[str, str]:
        """Our own key in the metadata; readers that do not know it skip it."""
        return {"Name": self.name, "SHA384": self.sha384, "Discovery": self.discovery.value}


@dataclass(frozen=True, slots=True)
class Metadata:
    """Upstream's keys, in upstream's order."""

    image_name: str
    image_version: str
    build_time: int
    """Seconds since 1970."""
    build_tool: str
    build_tool_version: str
    operating_system: str = "Linux"
    kernel_version: str = "Unknown"
    kernel: KernelInfo | None = None

    def to_json(self) -> bytes:
        """Compact JSON."""
        value: dict[str, Any] = {
            "ImageName": self.image_name,
            "ImageVersion": self.image_version,
            "BuildMetadata": {
                "BuildTime": datetime.fromtimestamp(self.build_time, UTC).isoformat(),
                "BuildTool": self.build_tool,
                "BuildToolVersion": self.build_tool_version,
                "OperatingSystem": self.operating_system,
                "KernelVersion": self.kernel_version,
            },
            "DockerInfo": None,
            "CustomMetadata": None,
        }
        if self.kernel is not None:
            value["Kernel"] = self.kernel.as_dict()
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def pad(metadata: bytes, offset: int, header_size: int) -> bytes:
    """Metadata whose data start at ``offset`` of the file, with spaces after it, so that the next section's data starts
    on a page of the file, and so, as images lie at 8 MiB, of memory."""
    return metadata + b" " * (-(offset + len(metadata) + header_size) % PAGE)


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object of a metadata section; ``null`` and ``{}`` are empty. Errors: ``EifError``."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EifError(f"metadata section: not JSON: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise EifError(f"metadata section: got a JSON {type(value).__name__}, expected an object")
    return value


def discovery(metadata: dict[str, Any], kernel: bzimage.Kernel) -> Discovery:
    """What the image says; else what its kernel's banner tells. Real enclaves have no ACPI, so that is the default."""
    said = metadata.get("Kernel")
    if isinstance(said, dict) and said.get("Discovery") in list(Discovery):
        return Discovery(said["Discovery"])
    return guess_discovery(kernel)


def guess_discovery(kernel: bzimage.Kernel) -> Discovery:
    """From the banner alone."""
    banner = kernel.banner.lower()
    return Discovery.ACPI if any(word in banner for word in DISTRIBUTION_KERNELS) else Discovery.CMDLINE
