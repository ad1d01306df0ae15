# SPDX-License-Identifier: Apache-2.0
"""A key in AWS KMS, by the whole ARN of the key: GetPublicKey once, Sign with MessageType DIGEST.

Source: AWS KMS API reference. The signature is checked where it is used (``eif.sign``), so the service is not believed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from enclavekit.errors import MissingError, SigningError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

TIMEOUT_S = 10
ATTEMPTS = 3
_ALGORITHMS = {32: "ECDSA_SHA_256", 48: "ECDSA_SHA_384", 64: "ECDSA_SHA_512"}
"""By the digest's size."""

_HINTS = {
    "AccessDenied": "the caller needs kms:GetPublicKey and kms:Sign on this key",
    "AccessDeniedException": "the caller needs kms:GetPublicKey and kms:Sign on this key",
    "NotFoundException": "no such key in that account and region",
    "DisabledException": "enable the key",
    "KMSInvalidStateException": "the key is being deleted, or is not usable now",
    "UnrecognizedClientException": "the credentials are not valid",
    "ExpiredTokenException": "the credentials have expired",
    "InvalidKeyUsageException": "the key must have the usage SIGN_VERIFY",
}


@dataclass(frozen=True, slots=True)
class KmsSigner:
    """A key of usage SIGN_VERIFY on P-256, P-384 or P-521."""

    arn: str
    client: Any
    public_key: EllipticCurvePublicKey

    @classmethod
    def open(cls, arn: str, region: str) -> Self:
        """Ask for its public key; credentials are found as AWS tools do. SigningError, or MissingError for boto3."""
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise MissingError("keys in AWS KMS need boto3", hint="pip install 'enclavekit[kms]'") from error
        config = Config(
            connect_timeout=TIMEOUT_S,
            read_timeout=TIMEOUT_S,
            retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        )
        client = _asking(arn, lambda: boto3.client("kms", region_name=region, config=config))
        answer = _asking(arn, lambda: client.get_public_key(KeyId=arn))
        usage = answer.get("KeyUsage")
        if usage != "SIGN_VERIFY":
            raise SigningError(f"{arn}: a key for {str(usage)[:32]}, expected SIGN_VERIFY")
        return cls(arn, client, _public_key(arn, answer.get("PublicKey")))

    def sign_digest(self, digest: bytes) -> bytes:
        """An ECDSA signature in DER."""
        answer = _asking(
            self.arn,
            lambda: self.client.sign(
                KeyId=self.arn, Message=digest, MessageType="DIGEST", SigningAlgorithm=_ALGORITHMS[len(digest)]
            ),
        )
        signature = answer.get("Signature")
        if not isinstance(signature, bytes):
            raise SigningError(f"{self.arn}: KMS gave no signature")
        return signature


def _public_key(arn: str, der: object) -> EllipticCurvePublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    from enclavekit.signing.pem import HASHES

    try:
        key = load_der_public_key(der) if isinstance(der, bytes) else None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SigningError(f"{arn}: KMS gave a public key that cannot be read") from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in HASHES:
        raise SigningError(f"{arn}: not an EC key on P-256, P-384 or P-521 (ECC_NIST_P256, _P384, _P521)")
    return key


def _asking(arn: str, ask: Callable[[], Any]) -> Any:  # noqa: ANN401 - boto3 has no types
    """What the service answers; all that boto3 raises becomes a SigningError."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return ask()
    except ClientError as error:
        failure = error.response.get("Error", {})
        code = str(failure.get("Code", "unknown"))
        words = " ".join(str(failure.get("Message", "")).split())[:200]
        raise SigningError(f"{arn}: KMS refused: {code}: {words}".rstrip(": "), hint=_HINTS.get(code)) from error
    except (BotoCoreError, Boto3Error) as error:
        words = " ".join(str(error).split())[:200]
        no_credentials = "credentials" in type(error).__name__.lower()
        hint = "set AWS_PROFILE, or what else the AWS tools take" if no_credentials else None
        raise SigningError(f"{arn}: {words[:1].lower()}{words[1:]}", hint=hint) from error
