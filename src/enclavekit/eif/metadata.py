# SPDX-License-Identifier: Apache-2.0
"""The metadata section: JSON that says what an image is called and how it was made. Not measured, so it proves nothing.

Source: aws-nitro-enclaves-image-format src/defs/eif_hasher.rs and src/utils/identity.rs for the keys, all of which are
needed. ``Kernel`` is ours: which kernel this is, and how it finds its virtio-mmio devices; and ``Container``: the id of
the container image that was built from, the digest of its configuration. Other readers skip them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from enclavekit.errors import EifError

PAGE_SIZE = 4096
MAX_DEPTH = 64
"""Of the JSON, so that all that walks through it can do so simply."""

_TOO_DEEP = "nested too deeply"


class Discovery(Enum):
    """How a kernel finds virtio-mmio devices; both ways are always offered to it, each can hinder the other kind."""

    ACPI = "acpi"
    CMDLINE = "cmdline"


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """The kernel in the image; ``sha384`` is the hexadecimal digest of its file."""

    name: str
    sha384: str
    discovery: Discovery


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """How the image was made. ``time`` is RFC 3339."""

    time: str
    tool: str
    tool_version: str
    operating_system: str
    kernel_version: str


@dataclass(frozen=True, slots=True)
class Metadata:
    """The whole section. ``docker_info`` and ``custom`` are any JSON."""

    image_name: str
    image_version: str
    build: BuildInfo
    docker_info: Any = None
    custom: Any = None
    kernel: KernelInfo | None = None
    container: str | None = None

    def encode(self, offset: int = 0) -> bytes:
        """Compact JSON, filled up with spaces so that after it, at ``offset``, and one section header a page begins.

        A ramdisk that starts on a page is used where it lies; of one that does not, Linux warns with a stack trace.
        """
        section_header_size = 12
        text = json.dumps(self._object(), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        data = text.encode()
        return data + b" " * (-(offset + len(data) + section_header_size) % PAGE_SIZE)

    def _object(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "ImageName": self.image_name,
            "ImageVersion": self.image_version,
            "BuildMetadata": {
                "BuildTime": self.build.time,
                "BuildTool": self.build.tool,
                "BuildToolVersion": self.build.tool_version,
                "OperatingSystem": self.build.operating_system,
                "KernelVersion": self.build.kernel_version,
            },
            "DockerInfo": self.docker_info,
            "CustomMetadata": self.custom,
        }
        if self.kernel:
            made["Kernel"] = {
                "Name": self.kernel.name,
                "SHA384": self.kernel.sha384,
                "Discovery": self.kernel.discovery.value,
            }
        if self.container:
            made["Container"] = self.container
        return made

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The inverse of encode; unknown keys are skipped, missing or odd ones an EifError."""
        made = _object_of(_load(data), "metadata")
        build = _object_of(made.get("BuildMetadata"), "metadata BuildMetadata")
        for key in ("DockerInfo", "CustomMetadata"):
            if key not in made:
                raise EifError(f"metadata: no key {key}")
        return cls(
            image_name=_string(made, "ImageName"),
            image_version=_string(made, "ImageVersion"),
            build=BuildInfo(
                time=_string(build, "BuildTime"),
                tool=_string(build, "BuildTool"),
                tool_version=_string(build, "BuildToolVersion"),
                operating_system=_string(build, "OperatingSystem"),
                kernel_version=_string(build, "KernelVersion"),
            ),
            docker_info=made["DockerInfo"],
            custom=made["CustomMetadata"],
            kernel=_kernel(made["Kernel"]) if "Kernel" in made else None,
            container=_string(made, "Container") if "Container" in made else None,
        )


def _kernel(value: object) -> KernelInfo:
    kernel = _object_of(value, "metadata Kernel")
    discovery = _string(kernel, "Discovery")
    if discovery not in [one.value for one in Discovery]:
        raise EifError(f"metadata Kernel: discovery {discovery[:32]!r}, expected acpi or cmdline")
    return KernelInfo(_string(kernel, "Name"), _string(kernel, "SHA384"), Discovery(discovery))


def _load(data: bytes) -> object:
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # lone surrogates and 1e999 pass the parser
    except (ValueError, RecursionError) as error:
        reason = _TOO_DEEP if isinstance(error, RecursionError) else str(error).partition(": ")[0].lower()
        raise EifError(f"metadata: not JSON in UTF-8: {reason}") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [below for one in level for below in _below(one)]
        if not level:
            return value
    raise EifError(f"metadata: not JSON in UTF-8: {_TOO_DEEP}")


def _below(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _object_of(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise EifError(f"{where}: {type(value).__name__}, expected an object")
    return value


def _string(made: dict[str, Any], key: str) -> str:
    value = made.get(key)
    if not isinstance(value, str):
        raise EifError(f"metadata: {key} is {type(value).__name__}, expected a string")
    return value
