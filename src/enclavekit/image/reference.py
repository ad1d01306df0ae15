# SPDX-License-Identifier: Apache-2.0
"""Names of images in registries, as docker takes them: ``alpine``, ``ghcr.io/a/b:1``, ``localhost:5000/x@sha256:…``.

Source: distribution/reference (the grammar), docker's defaults for what is left out.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Self

from enclavekit.errors import SourceError
from enclavekit.image.oci import Digest

DOCKER_HUB = "docker.io"
DOCKER_HUB_HOST = "registry-1.docker.io"
DOCKER_HUB_KEY = "https://index.docker.io/v1/"
"""How docker's configuration names it."""
DEFAULT_TAG = "latest"
MAX_NAME = 255

_HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9-]+)*|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
)
_PART = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class Reference:
    """``registry`` is a host, with a port if it is another than HTTPS's; a digest counts more than a tag."""

    registry: str
    repository: str
    tag: str | None
    digest: Digest | None

    def __str__(self) -> str:
        return f"{self.registry}/{self.repository}{f'@{self.digest}' if self.digest else f':{self.tag}'}"

    @property
    def host(self) -> str:
        """Where it is asked for."""
        return DOCKER_HUB_HOST if self.registry == DOCKER_HUB else self.registry

    @property
    def origin(self) -> str:
        """``https://HOST``; this machine itself is spoken to without TLS, as docker does."""
        name = self.host.rpartition(":")[0] if self.host.rpartition(":")[2].isdigit() else self.host
        return f"{'http' if _is_loopback(name.strip('[]')) else 'https'}://{self.host}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """SourceError for what is no name."""
        name, at, digest = text.removeprefix("//").partition("@")
        head, slash, rest = name.partition("/")
        if slash and ("." in head or ":" in head or head == "localhost"):
            registry = head
        else:
            registry, rest = DOCKER_HUB, name
        if registry in ("index.docker.io", "registry-1.docker.io"):
            registry = DOCKER_HUB
        repository, colon, tag = rest.partition(":")
        if registry == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        well_formed = (
            _HOST.fullmatch(registry)
            and len(repository) <= MAX_NAME
            and all(_PART.fullmatch(part) for part in repository.split("/"))
            and (not colon or _TAG.fullmatch(tag))
        )
        if not well_formed:
            raise SourceError(
                f"image name {text[:120]!r}: expected [REGISTRY/]NAME[:TAG][@DIGEST]", hint="names are lower case"
            )
        parsed = Digest.parse(digest, f"image name {text[:120]!r}") if at else None
        return cls(registry, repository, (tag if colon else DEFAULT_TAG) if not (at and not colon) else None, parsed)


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
