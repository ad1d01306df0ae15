# SPDX-License-Identifier: Apache-2.0
"""Who we are to a registry: docker's configuration file, and the helper programs that it names.

Source: docker/cli cli/config (config.json: auths, credsStore, credHelpers), docker/docker-credential-helpers README.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from enclavekit.errors import FileError, SourceError
from enclavekit.image.oci import expect_object
from enclavekit.image.reference import DOCKER_HUB, DOCKER_HUB_KEY

MAX_SIZE = 1 << 20
HELPER_TIMEOUT_S = 60
_HELPER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_IDENTITY_TOKEN = "<token>"  # noqa: S105 - the user name that helpers give for one


@dataclass(frozen=True, slots=True)
class Credentials:
    """A name and password, or a token that is changed for others. Never shown."""

    user: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The header's value (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


@dataclass(frozen=True, slots=True)
class DockerConfig:
    """What is in ``config.json``; nothing when there is none."""

    auths: dict[str, Any] = field(default_factory=dict, repr=False)
    helpers: dict[str, Any] = field(default_factory=dict)
    store: str | None = None
    search_path: str | None = None

    @classmethod
    def read(cls, path: Path, search_path: str | None = None) -> Self:
        """``path`` is the file's; helpers are looked for in ``search_path``. SourceError when it is none."""
        try:
            data = path.read_bytes()[: MAX_SIZE + 1]
        except FileNotFoundError:
            return cls(search_path=search_path)
        except OSError as error:
            raise FileError.of(error, path, "read") from error
        where = str(path)
        try:
            made = expect_object(json.loads(data.decode()), where)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{where}: not JSON in UTF-8") from error
        store = made.get("credsStore")
        return cls(
            auths=expect_object(made.get("auths") or {}, f"{where}: auths"),
            helpers=expect_object(made.get("credHelpers") or {}, f"{where}: credHelpers"),
            store=store if isinstance(store, str) and store else None,
            search_path=search_path,
        )

    def credentials(self, registry: str) -> Credentials | None:
        """For a registry; None for those that it says nothing of. SourceError when a helper fails."""
        keys = (DOCKER_HUB_KEY, DOCKER_HUB) if registry == DOCKER_HUB else (registry, f"https://{registry}")
        for key in keys:
            helper = self.helpers.get(key)
            if helper:
                return self._ask(str(helper), key)
        if self.store:
            found = self._ask(self.store, keys[0])
            if found:
                return found
        for key in (*keys, *(f"https://{registry}/{version}/" for version in ("v1", "v2"))):
            if key in self.auths:
                return _stored(expect_object(self.auths[key], f"auths of {registry}"), registry)
        return None

    def _ask(self, helper: str, key: str) -> Credentials | None:
        if not _HELPER.fullmatch(helper):
            raise SourceError(f"credential helper {helper[:64]!r}: expected a name, as ecr-login or pass")
        program = f"docker-credential-{helper}"
        found = shutil.which(program, path=self.search_path)
        if found is None:
            raise SourceError(f"{program}: not installed, but docker's configuration names it for {key}")
        try:
            done = subprocess.run(
                [found, "get"], input=key.encode(), capture_output=True, timeout=HELPER_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SourceError(f"{program}: {str(error)[:120]}") from error
        if done.returncode:
            said = b" ".join((done.stdout + b" " + done.stderr).split()).decode("utf-8", "replace")
            if "not found" in said:  # in its store: we are nobody there
                return None
            raise SourceError(f"{program}: failed for {key}: {said[:160]}")
        try:
            made = expect_object(json.loads(done.stdout[:MAX_SIZE].decode()), program)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{program}: its answer is not JSON") from error
        user, secret = str(made.get("Username", "")), str(made.get("Secret", ""))
        if user == _IDENTITY_TOKEN:
            return Credentials(identity_token=secret)
        return Credentials(user, secret)


def _stored(entry: dict[str, Any], registry: str) -> Credentials | None:
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Credentials(identity_token=token)
    if isinstance(entry.get("username"), str) and entry["username"]:
        return Credentials(entry["username"], str(entry.get("password", "")))
    packed = entry.get("auth")
    if not isinstance(packed, str) or not packed:
        return None
    try:
        user, colon, password = base64.b64decode(packed, validate=True).decode().partition(":")
    except (binascii.Error, ValueError) as error:
        raise SourceError(f"docker's configuration: auth of {registry} is no base64 of NAME:PASSWORD") from error
    if not colon:
        raise SourceError(f"docker's configuration: auth of {registry} has no password")
    return Credentials(user, password.rstrip("\0"))
