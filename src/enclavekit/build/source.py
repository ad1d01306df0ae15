# SPDX-License-Identifier: Apache-2.0
"""Where an image's root file system comes from, in one word: ``dir:ROOT``, ``oci:LAYOUT:TAG`` and the like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # typeshed has it not

from enclavekit.eif import Arch, Lock
from enclavekit.eif.lock import IMAGE
from enclavekit.errors import UsageError
from enclavekit.image.container import ContainerImage, Report
from enclavekit.image.docker_daemon import open_daemon
from enclavekit.image.layer_cache import LayerCache
from enclavekit.image.layouts import open_archive, open_docker_archive, open_layout
from enclavekit.image.oci import Digest
from enclavekit.image.reference import Reference
from enclavekit.image.registry import Registry
from enclavekit.image.registry_auth import DockerConfig
from enclavekit.image.sources import Source, open_container, open_directory, open_tar

KINDS = {
    # kind: what stands behind it
    "dir": "DIRECTORY",
    "tar": "FILE",
    "oci": "DIRECTORY[:TAG]",
    "oci-archive": "FILE[:TAG]",
    "docker-archive": "FILE[:NAME:TAG]",
    "docker-daemon": "NAME[:TAG]",
    "docker": "//[REGISTRY/]NAME[:TAG][@DIGEST]",
}


@dataclass(frozen=True, slots=True)
class Access:
    """What container images need besides their name.

    ``cache`` is where layers are unpacked to, ``report`` is told of each one's progress, ``docker_config`` says who we
    are to registries, ``proxies`` has a proxy's URL for a scheme, and under ``no`` the hosts that need none.
    """

    cache: LayerCache
    report: Report = lambda name, done, size: None
    docker_config: DockerConfig = field(default_factory=DockerConfig)
    docker_sockets: Sequence[Path] = ()
    proxies: Mapping[str, str] = field(default_factory=dict)


def is_source(text: str) -> bool:
    """Whether this names a source, and not an image's file."""
    kind, colon, _ = text.partition(":")
    return bool(colon) and kind in KINDS


def open_source(
    text: str, *, arch: Arch, keep_owners: bool, scratch: Path, access: Access, locked: Lock | None = None
) -> Source:
    """The tree of a source; of container images, the one for this architecture. UsageError for words that name none.

    From a registry comes what is locked, whatever the tag means today.
    """
    kind, colon, rest = text.partition(":")
    if not colon or not rest or kind not in KINDS:
        known = ", ".join(f"{name}:{what}" for name, what in KINDS.items())
        raise UsageError(
            f"source {text!r}: expected one of {known}", hint="for example dir:./root, oci:./layout:latest"
        )
    if kind == "dir":
        return open_directory(Path(rest), keep_owners=keep_owners)
    if kind == "tar":
        return open_tar(Path(rest), scratch=scratch)
    if kind == "docker":
        reference = Reference.parse(rest)
        pinned = locked.find(IMAGE) if locked else None
        if pinned:
            reference = replace(reference, digest=Digest.parse(pinned.digest, "enclave.lock"))
        scheme = reference.origin.partition(":")[0]
        direct = scheme == "http" or proxy_bypass_environment(reference.host, {"no": access.proxies.get("no", "")})
        proxy = None if direct else access.proxies.get(scheme)
        registry = Registry(reference, access.docker_config, proxy)
        return open_container(lambda files: registry.find(arch), access.cache, access.report)
    if kind == "docker-daemon":
        return open_container(
            lambda files: open_daemon(rest, arch, access.docker_sockets, files, scratch=scratch),
            access.cache,
            access.report,
        )
    path, tag = _split(rest)

    def find(files: ExitStack) -> ContainerImage:
        if kind == "oci":
            return open_layout(path, tag, arch, files)
        if kind == "oci-archive":
            return open_archive(path, tag, arch, files, scratch=scratch)
        return open_docker_archive(path, tag, arch, files, scratch=scratch)

    return open_container(find, access.cache, access.report)


def _split(text: str) -> tuple[Path, str | None]:
    """A path and the tag behind it; both may have colons, so the longest path that exists is taken."""
    end = len(text)
    while end > 0:
        if Path(text[:end]).exists():
            return Path(text[:end]), text[end + 1 :] or None
        end = text.rfind(":", 0, end)
    path, colon, tag = text.partition(":")
    return Path(path), tag if colon else None
