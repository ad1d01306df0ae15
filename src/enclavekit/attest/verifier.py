# SPDX-License-Identifier: Apache-2.0
"""The verifier of attestation documents, in the order in which it goes about it.

     1  the bytes are a document                       DocumentError
     2  it is of the kind demanded                     PolicyError
     3  its chain begins with a pinned root            TrustError
     4  each certificate is the next one's issuer, may be that, and is valid at the time in question
     5  the leaf's key has signed the document         DocumentSignatureError
     6  the leaf is the module's that the document names, and was valid when the document was made       TrustError
     7  the document is young enough (unless it is judged at its own time)                               PolicyError
     8  the enclave is not in debug mode
     9  one accepted set of PCRs is in it, whole
    10  nonce, user data, public key, module and instance are those demanded

Each step raises, or the next one follows; who gets to the end gets a ``Verified``, and only there are data to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from enclavekit.attest.chain import CACHED_LINKS, ChainCertificate, ChainVerifier, time_text
from enclavekit.attest.document import SIGNATURE_SIZE, Claims, Document, Kind
from enclavekit.attest.policy import Policy
from enclavekit.attest.roots import AWS_ROOTS, Root
from enclavekit.errors import (
    BadSignatureError,
    ModuleMismatchError,
    SignatureRangeError,
    TimestampOutsideLeafError,
)

LEAF_SKEW_MS = 60_000
P384_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
"""Of the curve's base point (SEC 2 §2.5.1): R and S lie below it."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ALGORITHM = ECDSA(SHA384())
_SEAL = object()


class Moment(Enum):
    """The time at which a document was judged."""

    NOW = "now"
    GIVEN = "given"
    DOCUMENT = "document"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What a verified document says. Made by a ``Verifier``, and by nothing else.

    ``policy`` and ``matched``, the accepted set of PCRs that held, say what it was compared with; ``root`` who vouches
    for it. ``at`` is the time it was judged at, ``moment`` which one that is; ``expires`` when its chain does.
    """

    document: Document
    policy: Policy
    matched: Mapping[int, bytes]
    root: Root
    moment: Moment
    at: datetime
    made: datetime
    expires: datetime
    kind: Kind
    module_id: str
    instance_id: str
    pcrs: Mapping[int, bytes]
    debug: bool
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("only a Verifier makes a Verified")


def _now() -> datetime:
    return datetime.now(UTC)


class Verifier:
    """Judges documents. Roots are AWS's unless named; those for development are never among others.

    Threads may share one, and it is worth keeping: links of chains that it has verified it need not verify again.
    """

    def __init__(
        self,
        roots: Iterable[Root] = AWS_ROOTS,
        *,
        clock: Callable[[], datetime] = _now,
        cached_links: int = CACHED_LINKS,
    ) -> None:
        trusted = tuple(roots)
        if not trusted:
            raise ValueError("a verifier without roots trusts nothing")
        if len({root.development for root in trusted}) > 1:
            raise ValueError("a verifier for development trusts no other root")
        self._chains = ChainVerifier(trusted, cached_links)
        self._clock = clock

    def verify(self, document: Document | bytes, policy: Policy) -> Verified:
        """Judge now: the chain is valid by the clock, and the document is young. AttestationError, or it is so."""
        return self._judge(document, policy, Moment.NOW, self._clock())

    def verify_at(self, document: Document | bytes, policy: Policy, at: datetime) -> Verified:
        """Judge as if it were that time (with time zone)."""
        return self._judge(document, policy, Moment.GIVEN, at)

    def verify_archived(self, document: Document | bytes, policy: Policy) -> Verified:
        """Judge at the document's own time: that it was genuine when it was made, and nothing about today.

        Sound because the time is signed, by a key whose certificate must be valid then. Its age is not judged; whoever
        had the key at that time can show such a document for ever.
        """
        return self._judge(document, policy, Moment.DOCUMENT, None)

    def _judge(self, document: Document | bytes, policy: Policy, moment: Moment, at: datetime | None) -> Verified:
        if not isinstance(policy, Policy):
            raise TypeError("a document is judged by a Policy")
        # Read again even when it was before: what is verified and what is returned come from the same bytes.
        read = Document.parse(bytes(document), ignore_unknown=policy.ignore_unknown)  # 1
        claims = read.unverified
        at_ms = claims.timestamp_ms if at is None else _milliseconds(at)
        policy.check_kind(claims)  # 2
        root, chain = self._chains.verify(claims, at_ms)  # 3, 4
        leaf = chain[-1]
        check_signature(read, leaf)  # 5
        _check_module(claims, leaf)  # 6
        _check_made(claims, leaf)
        if moment is not Moment.DOCUMENT:
            policy.check_age(claims, at_ms)  # 7
        policy.check_debug(claims)  # 8
        matched = policy.check_pcrs(claims)  # 9
        policy.check_options(claims)  # 10
        return Verified(
            document=read,
            policy=policy,
            matched=matched,
            root=root,
            moment=moment,
            at=_datetime(at_ms),
            made=_datetime(claims.timestamp_ms),
            expires=_datetime(min(certificate.not_after_ms for certificate in chain)),
            kind=claims.kind,
            module_id=claims.module_id,
            instance_id=claims.instance_id,
            pcrs=claims.pcrs,
            debug=claims.debug,
            public_key=claims.public_key,
            user_data=claims.user_data,
            nonce=claims.nonce,
            seal=_SEAL,
        )


def check_signature(document: Document, leaf: ChainCertificate) -> None:
    """DocumentSignatureError unless the leaf's key signed the bytes that were received.

    S is not asked to be low: half of AWS's are high. So (R, n - S) holds too, and a document's digest is no replay key.
    """
    half = SIGNATURE_SIZE // 2
    r = int.from_bytes(document.signature[:half], "big")
    s = int.from_bytes(document.signature[half:], "big")
    for name, number in (("R", r), ("S", s)):
        if not 1 <= number < P384_ORDER:
            raise SignatureRangeError(f"signature: {name} is not between 1 and the order of P-384")
    try:
        leaf.key.verify(encode_dss_signature(r, s), document.to_be_signed(), _ALGORITHM)
    except InvalidSignature as error:
        raise BadSignatureError("signature: not by the key of the certificate, or not over these bytes") from error


def _check_module(claims: Claims, leaf: ChainCertificate) -> None:
    name = leaf.common_name.partition(".")[0]
    if name != claims.module_id:
        raise ModuleMismatchError(f"module_id: {claims.module_id!a}, the certificate is that of {name!a}")


def _check_made(claims: Claims, leaf: ChainCertificate) -> None:
    first, last = leaf.not_before_ms - LEAF_SKEW_MS, leaf.not_after_ms + LEAF_SKEW_MS
    if not first <= claims.timestamp_ms <= last:
        raise TimestampOutsideLeafError(
            f"timestamp: {time_text(claims.timestamp_ms)}, the certificate is valid from "
            f"{time_text(leaf.not_before_ms)} to {time_text(leaf.not_after_ms)}"
        )


def _milliseconds(moment: datetime) -> int:
    if moment.tzinfo is None:
        raise ValueError("a time without its zone")
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def _datetime(moment_ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=moment_ms)
