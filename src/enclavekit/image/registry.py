# SPDX-License-Identifier: Apache-2.0
"""A client for registries: manifests and blobs of one repository, with all that goes wrong on the way.

Source: OCI distribution specification 1.1; distribution/distribution docs/spec/auth/token.md and oauth2.md for tokens.
Every answer is hostile: sizes are bounded, digests checked, and redirects followed by hand, so that what we are known
by never goes to another host.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urljoin, urlsplit

from enclavekit.eif import CHUNK_SIZE, Arch
from enclavekit.errors import MissingError, OfflineError, SourceError
from enclavekit.image.container import ContainerImage
from enclavekit.image.layouts import goarch, image_of
from enclavekit.image.oci import (
    INDEXES,
    MANIFESTS,
    MAX_DOCUMENT_SIZE,
    MAX_INDEX_DEPTH,
    Descriptor,
    Digest,
    Manifest,
    choose,
    expect_object,
    parse_index,
)
from enclavekit.image.reference import Reference
from enclavekit.image.registry_auth import Credentials, DockerConfig

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

ATTEMPTS = 5
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 15, 60
LONGEST_PAUSE_S = 60
MAX_REDIRECTS = 5
MAX_ANSWER = 1 << 20
"""Of a token service, or an error's text."""

_CHALLENGE = re.compile(r'([a-zA-Z_]+)\s*=\s*(?:"([^"]*)"|([^\s,]+))')
_AGAIN = (408, 429, 500, 502, 503, 504)


@dataclass(slots=True)
class Registry:
    """One repository. ``pause`` waits; ``proxy`` is a URL. A client can be used by several threads."""

    reference: Reference
    config: DockerConfig
    proxy: str | None = None
    pause: Callable[[float], None] = time.sleep
    _http: PoolManager | None = None
    _authorization: str | None = field(default=None, repr=False)
    _lock: Lock = field(default_factory=Lock)

    def find(self, arch: Arch | None) -> ContainerImage:
        """The image for Linux on this architecture; its layers are fetched when they are read."""
        name = str(self.reference)
        descriptor, data = self._manifest(str(self.reference.digest or self.reference.tag), self.reference.digest)
        for _ in range(MAX_INDEX_DEPTH):
            if descriptor.media_type not in INDEXES:
                break
            chosen = choose(parse_index(data, f"{name}: index"), goarch(arch), name)
            descriptor, data = self._manifest(str(chosen.digest), chosen.digest)
        else:
            raise SourceError(f"{name}: more than {MAX_INDEX_DEPTH} indexes in one another")
        manifest = Manifest.parse(data, f"{name}: manifest")
        config = self._document(manifest.config)
        contents = (RegistryBlob(self, layer.digest, layer.size) for layer in manifest.layers)
        return image_of(name, (descriptor, data), config, arch, iter(contents))

    def blob(self, digest: Digest, offset: int) -> Iterator[bytes]:
        """A blob's bytes from an offset on, as they come: they can break off. SourceError for a refusal."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        answer = self._get(f"blobs/{digest}", headers)
        try:
            skip = offset if answer.status == 200 else 0  # it does not know ranges
            for chunk in answer.stream(CHUNK_SIZE, decode_content=False):
                if skip:
                    skip, chunk = max(0, skip - len(chunk)), chunk[skip:]  # noqa: PLW2901
                if chunk:
                    yield chunk
        finally:
            answer.release_conn()
            answer.close()

    def _manifest(self, reference: str, digest: Digest | None) -> tuple[Descriptor, bytes]:
        answer = self._get(f"manifests/{reference}", {"Accept": ", ".join((*MANIFESTS, *INDEXES))})
        where = f"{self.reference}: manifest"
        data = _bounded(answer, MAX_DOCUMENT_SIZE, where)
        if digest:
            digest.check(data, where)
        found = digest or Digest.of(data)
        told = answer.headers.get("Docker-Content-Digest")
        if digest is None and told:
            Digest.parse(told, where).check(data, where)
        made = expect_object(json_of(data, where), where)
        media_type = str(made.get("mediaType") or answer.headers.get("Content-Type", "").partition(";")[0])
        if media_type not in (*MANIFESTS, *INDEXES):
            raise SourceError(f"{where}: of type {media_type[:80]!r}, expected an image's or an index's")
        return Descriptor(media_type, found, len(data)), data

    def _document(self, descriptor: Descriptor) -> bytes:
        where = f"{self.reference}: {descriptor.digest}"
        if descriptor.size > MAX_DOCUMENT_SIZE:
            raise SourceError(f"{where}: {descriptor.size} bytes, expected at most {MAX_DOCUMENT_SIZE}")
        data = b"".join(RegistryBlob(self, descriptor.digest, descriptor.size).chunks())
        return descriptor.digest.check(data, where)

    def _get(self, path: str, headers: dict[str, str]) -> BaseHTTPResponse:
        """The answer to a request that was granted; who we are is said when it is asked for."""
        url = f"{self.reference.origin}/v2/{self.reference.repository}/{path}"
        asked = False
        while True:
            sent = {**headers, **({"Authorization": self._authorization} if self._authorization else {})}
            answer = self._follow(url, sent)
            if answer.status in (200, 206):
                return answer
            challenge = answer.headers.get("WWW-Authenticate", "")
            text = _error_text(answer)
            if answer.status == 401 and not asked and challenge:
                asked = True
                self._authorize(challenge)
                continue
            hints = {
                401: "log in with docker login, podman login or skopeo login",
                403: "this account may not read it",
                404: "check the name and the tag",
            }
            raise SourceError(
                f"{self.reference}: the registry says {answer.status}{f': {text}' if text else ''}",
                hint=hints.get(answer.status),
            )

    def _follow(self, url: str, headers: dict[str, str]) -> BaseHTTPResponse:
        """Redirects, none of them back to plain HTTP; another host is not told who we are."""
        for _ in range(MAX_REDIRECTS):
            answer = self._ask(url, headers)
            if answer.status not in (301, 302, 303, 307, 308):
                return answer
            target = urljoin(url, answer.headers.get("Location", ""))
            _drop(answer)
            before, after = urlsplit(url), urlsplit(target)
            if after.scheme not in ("https", before.scheme) or not after.hostname:
                raise SourceError(f"{self.reference}: sent to {target[:120]!r}, expected https")
            if (before.scheme, before.netloc) != (after.scheme, after.netloc):
                headers = {key: value for key, value in headers.items() if key != "Authorization"}
            url = target
        raise SourceError(f"{self.reference}: more than {MAX_REDIRECTS} redirects")

    def _ask(self, url: str, headers: dict[str, str], form: dict[str, str] | None = None) -> BaseHTTPResponse:
        """One request, again when there is hope; the last answer, or OfflineError."""
        from urllib3.exceptions import HTTPError

        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                answer = self._pool().request(
                    "GET" if form is None else "POST",
                    url,
                    headers={"User-Agent": "enclavekit", **headers},
                    body=None if form is None else urlencode(form),
                    preload_content=False,
                    redirect=False,
                    retries=False,
                )
            except HTTPError as error:
                reason = getattr(error.__cause__, "strerror", None) or str(error.__cause__ or error)
                if attempt + 1 < ATTEMPTS:
                    self.pause(2.0**attempt)
                continue
            if answer.status not in _AGAIN or attempt + 1 == ATTEMPTS:
                return answer
            wait = _retry_after(answer) or 2.0**attempt
            _drop(answer)
            self.pause(min(wait, LONGEST_PAUSE_S))
        host = urlsplit(url).netloc
        raise OfflineError(
            f"{host}: cannot be reached: {' '.join(reason.lower().split())[:160]}", hint="check the network"
        )

    def _authorize(self, challenge: str) -> None:
        """Answer a challenge (RFC 7235): Basic, or Bearer with a token from the service that it names."""
        scheme, _, rest = challenge.partition(" ")
        values = {key.lower(): quoted or plain for key, quoted, plain in _CHALLENGE.findall(rest[:4096])}
        found = self.config.credentials(self.reference.registry)
        if scheme.lower() == "basic":
            if found is None or not found.user:
                raise SourceError(
                    f"{self.reference}: the registry wants a name and password",
                    hint="log in with docker login, podman login or skopeo login",
                )
            self._authorization = found.basic
        elif scheme.lower() == "bearer":
            self._authorization = f"Bearer {self._token(values, found)}"
        else:
            raise SourceError(f"{self.reference}: the registry wants {scheme[:32]!r}, expected Basic or Bearer")

    def _token(self, challenge: dict[str, str], found: Credentials | None) -> str:
        realm = challenge.get("realm", "")
        parts = urlsplit(realm)
        allowed = ("https", "http") if self.reference.origin.startswith("http:") else ("https",)
        if parts.scheme not in allowed or not parts.hostname:
            raise SourceError(f"{self.reference}: tokens from {realm[:120]!r}, expected https")
        scope = challenge.get("scope") or f"repository:{self.reference.repository}:pull"
        query = {"service": challenge.get("service", ""), "scope": scope}
        if found and found.identity_token:
            form = {**query, "grant_type": "refresh_token", "client_id": "enclavekit"}
            answer = self._ask(
                realm,
                {"Content-Type": "application/x-www-form-urlencoded"},
                {**form, "refresh_token": found.identity_token},
            )
        else:
            url = f"{realm}{'&' if parts.query else '?'}{urlencode({k: v for k, v in query.items() if v})}"
            answer = self._ask(url, {"Authorization": found.basic} if found and found.user else {})
        where = f"{self.reference}: token service {parts.hostname}"
        if answer.status != 200:
            text = _error_text(answer)
            raise SourceError(f"{where}: says {answer.status}{f': {text}' if text else ''}")
        made = expect_object(json_of(_bounded(answer, MAX_ANSWER, where), where), where)
        token = made.get("token") or made.get("access_token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise SourceError(f"{where}: gave no token")
        return token

    def _pool(self) -> PoolManager:
        with self._lock:
            if self._http is None:
                try:
                    import urllib3
                except ImportError as error:
                    raise MissingError("registries need urllib3", hint="pip install 'enclavekit[registry]'") from error
                timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S)
                if self.proxy:
                    self._http = urllib3.ProxyManager(self.proxy, timeout=timeout, maxsize=8)
                else:
                    self._http = urllib3.PoolManager(timeout=timeout, maxsize=8)
            return self._http


@dataclass(frozen=True, slots=True)
class RegistryBlob:
    """A blob that is fetched when it is read, and goes on where a connection broke off."""

    registry: Registry
    digest: Digest
    size: int

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, not more than its size; the digest is for the reader to check."""
        from urllib3.exceptions import HTTPError

        done = failures = 0
        while done < self.size:
            before = done
            reason = "the connection ended"
            try:
                for chunk in self.registry.blob(self.digest, done):
                    done += len(chunk)
                    if done > self.size:
                        raise SourceError(f"{self.registry.reference}: {self.digest}: more than {self.size} bytes")
                    yield chunk
            except HTTPError as error:
                reason = " ".join(str(error).split())[:120]
            if done == self.size:
                return
            failures = 0 if done > before else failures + 1
            if failures >= ATTEMPTS:
                raise OfflineError(
                    f"{self.registry.reference}: {self.digest}: {done} of {self.size} bytes: {reason}",
                    hint="what was fetched is lost; try again",
                )
            self.registry.pause(min(2.0**failures, LONGEST_PAUSE_S))


def json_of(data: bytes, where: str) -> Any:  # noqa: ANN401 - any JSON
    """Of an answer."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: the answer is not JSON") from error


def _bounded(answer: BaseHTTPResponse, limit: int, where: str) -> bytes:
    from urllib3.exceptions import HTTPError

    try:
        data: bytes = answer.read(limit + 1, decode_content=False)
        while len(data) <= limit and (more := answer.read(limit + 1 - len(data), decode_content=False)):
            data += more
    except HTTPError as error:
        raise OfflineError(f"{where}: the connection ended", hint="try again") from error
    if len(data) > limit:
        answer.close()
        raise SourceError(f"{where}: more than {limit} bytes")
    answer.release_conn()
    return data


def _drop(answer: BaseHTTPResponse) -> None:
    answer.close()


def _error_text(answer: BaseHTTPResponse) -> str:
    """What the specification's error object says, in one printable line."""
    try:
        errors = json_of(_bounded(answer, MAX_ANSWER, ""), "")["errors"]
        text = str(errors[0].get("message") or errors[0].get("code") or "")
    except (SourceError, OfflineError, LookupError, TypeError, AttributeError):
        return ""
    return "".join(char if char.isprintable() else " " for char in text)[:160]


def _retry_after(answer: BaseHTTPResponse) -> float | None:
    """In seconds (RFC 9110 §10.2.3); a date is not understood."""
    text = answer.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else None
