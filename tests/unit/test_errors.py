# SPDX-License-Identifier: Apache-2.0
"""Every error class has a code of its own, stable because scripts match it."""

from __future__ import annotations

from collections.abc import Iterator

from enclavekit import errors

CODES = {
    "huge-pages",
    "allocation", "allocator-config",
    "boot", "build", "locked", "control", "guest-memory", "heartbeat", "no-docker", "no-enclave",
    "panic", "no-image", "project",
    "lab", "no-lab",
    "carrier", "certificate", "connection", "eif", "error", "file", "format", "guest",
    "image-too-large", "kernel", "kernel-build", "launch", "memory", "missing", "no-kernel", "no-qemu", "offline",
    "protocol", "refused", "runtime", "signature", "signing", "source", "truncated", "unsupported-host", "usage",
    "virtqueue",
}  # fmt: skip
ATTESTATION_CODES = {
    "attestation", "document", "document-too-large", "cbor-truncated", "cbor-malformed",
    "cbor-depth", "trailing-bytes", "wrong-tag", "not-cose-sign1", "bad-protected",
    "bad-alg", "unprotected-not-empty", "bad-payload", "bad-signature-length", "payload-not-map",
    "duplicate-key", "missing-field", "unknown-field", "ambiguous-kind", "bad-type",
    "bad-length", "bad-module-id", "bad-digest", "bad-timestamp", "bad-pcrs",
    "bad-pcr-index", "bad-pcr-length", "bad-cabundle", "untrusted", "untrusted-root",
    "bad-certificate", "bad-key-type", "bad-cert-sigalg", "issuer-mismatch", "self-issued",
    "bad-cert-signature", "cert-not-valid-at", "unknown-critical-extension", "ca-basic-constraints", "ca-key-usage",
    "path-length", "leaf-key-usage", "leaf-basic-constraints", "module-mismatch", "timestamp-outside-leaf",
    "document-signature", "signature-out-of-range", "bad-signature", "policy", "no-reference-values",
    "zero-pcr", "wrong-kind", "debug-mode", "pcr-mismatch", "nonce-mismatch",
    "user-data-mismatch", "public-key-mismatch", "module-id-mismatch", "instance-id-mismatch", "stale",
    "recipient", "nsm",
}  # fmt: skip
DRIVER_CODES = {
    "driver",
    "ne-vcpu-already-used",
    "ne-vcpu-not-in-cpu-pool",
    "ne-vcpu-invalid-cpu-core",
    "ne-invalid-mem-region-size",
    "ne-invalid-mem-region-addr",
    "ne-unaligned-mem-region-addr",
    "ne-mem-region-already-used",
    "ne-mem-not-huge-page",
    "ne-mem-different-numa-node",
    "ne-mem-max-regions",
    "ne-no-mem-regions-added",
    "ne-no-vcpus-added",
    "ne-enclave-mem-min-size",
    "ne-full-cores-not-used",
    "ne-not-in-init-state",
    "ne-invalid-vcpu",
    "ne-no-cpus-avail-in-pool",
    "ne-invalid-page-size",
    "ne-invalid-flag-value",
    "ne-invalid-enclave-cid",
}


def classes(root: type[errors.Error] = errors.Error) -> Iterator[type[errors.Error]]:
    yield root
    for child in root.__subclasses__():
        yield from classes(child)


def test_codes_are_unique_and_known() -> None:
    codes = [found.code for found in classes()]
    assert len(codes) == len(set(codes))
    assert set(codes) == CODES | ATTESTATION_CODES | DRIVER_CODES


def test_all_are_in_one_module() -> None:
    assert {found.__module__ for found in classes()} == {"enclavekit.errors"}


def test_an_os_error_names_file_and_reason() -> None:
    error = errors.FileError.of(OSError(28, "No space left on device"), "a.eif", "write", hint="make room")
    assert str(error) == "cannot write a.eif: no space left on device"
    assert error.hint == "make room"


def test_every_class_is_explained() -> None:
    """`enclave explain CODE` prints its docstring, and its remedy or that of what it is a kind of."""
    for kind in classes():
        where = f"enclavekit.errors.{kind.__name__}"
        remedies = [vars(one)["remedy"] for one in kind.__mro__ if one is not errors.Error and "remedy" in vars(one)]
        if kind is not errors.Error:
            assert remedies, f"{where}: add remedy = '...' below its code: half a sentence, what helps a user"
            assert remedies[0][:1] == "`" or remedies[0][:1].islower(), (
                f"{where}: its remedy starts with a small letter"
            )
            assert not remedies[0].endswith("."), f"{where}: its remedy ends without a full stop"
        assert kind.__doc__, f"{where}: add a docstring: a sentence that says a user what the error means"
        first = kind.__doc__.partition("\n\n")[0].rstrip()
        assert first.endswith("."), f"{where}: its docstring starts with a sentence"
