# SPDX-License-Identifier: Apache-2.0
"""The one tree of errors. Hostile input, a hostile guest or a lacking machine raise nothing else.

A message is one line: where, what, got, expected; numbers in hex with their width; lower case, no full stop.
``code`` is stable: scripts match it. ``hint`` says what to do next in this case, ``remedy`` what helps in most;
``enclave explain CODE`` prints it below the first words of the class's docstring, so both are written for users.
Mistakes of the caller's own code are ``TypeError`` and ``ValueError``, as everywhere in Python.

One file, long as it is: it is a table of codes rather than a module.
"""

from __future__ import annotations

import os
from typing import ClassVar, Self


class Error(Exception):
    """Base of everything that enclavekit raises on purpose."""

    code: ClassVar[str] = "error"
    remedy: ClassVar[str] = "read the message: it says where and what; with `--json` its code tells the kind"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(Error):
    """The words of a command do not fit together."""

    code = "usage"
    remedy = "see the command's `--help`; the hint names what does not fit"


class FileError(Error):
    """The system refused something with a file: unreadable, missing, disk full."""

    code = "file"
    remedy = "check that the path exists, that this user may read or write it, and that the disk has room"

    @classmethod
    def of(cls, error: OSError, path: str | os.PathLike[str], what: str, *, hint: str | None = None) -> Self:
        """``what`` is the action that failed, as in ``cannot read a.eif: permission denied``."""
        reason = (error.strerror or str(error)).lower()
        return cls(f"cannot {what} {os.fspath(path)}: {reason}", hint=hint)


class FormatError(Error):
    """Bytes that are not what their format says."""

    code = "format"
    remedy = "check that the file is of the kind that the command takes, and that it was copied whole"


class TruncatedError(FormatError):
    """The bytes end before their format does."""

    code = "truncated"
    remedy = "copy or download the file again: it ended early"


class EifError(FormatError):
    """Not an EIF, or one that breaks the format's rules."""

    code = "eif"
    remedy = "see with `enclave describe F.eif` which rule it breaks, and build it again"


class SignatureError(Error):
    """A signature that does not hold: another key's, over other bytes, of another image."""

    code = "signature"
    remedy = "see with `enclave describe F.eif` whose signature it is; sign the image again with `enclave resign`"


class CertificateError(SignatureError):
    """The certificate of a signature is not valid at that time, or not fit to sign with."""

    code = "certificate"
    remedy = "look at its dates with `enclave describe F.eif`; make another with `enclave keygen`, and sign again"


class SigningError(Error):
    """A key cannot be used, or a signature could not be made."""

    code = "signing"
    remedy = "check that key and certificate belong together, and that KMS, the token or the password is at hand"


class KernelError(FormatError):
    """Not a kernel that can boot here: no bzImage, another architecture, a broken module."""

    code = "kernel"
    remedy = "take a bzImage for x86_64 with virtio_mmio and vsock: `enclave kernel list` shows those that are here"


class KernelBuildError(Error):
    """A guest kernel that cannot be built: its options contradict each other, or its build fails."""

    code = "kernel-build"
    remedy = "with fragments of your own, build without them first; the log of the build says what failed"


class SourceError(Error):
    """A directory, tar or image that no ramdisk can be made of."""

    code = "source"
    remedy = "look at the path in the message; `docs/sources.md` says what a source may hold"


class NoImageError(SourceError):
    """A docker daemon has no image of that name."""

    code = "no-image"
    remedy = "pull or build it with the daemon, or name it with `docker://` to have it from its registry"


class BuildError(Error):
    """An image cannot be made of these inputs."""

    code = "build"
    remedy = "look at what the message names: an input of the build is not as it must be"


class ProjectError(FormatError):
    """An ``enclave.toml`` that is none, or has what no option is for."""

    code = "project"
    remedy = "compare it with what `enclave init` writes; `docs/project.md` explains each key"


class LockedError(BuildError):
    """``enclave.lock`` locks something else than what is here."""

    code = "locked"
    remedy = (
        "if the change is meant, build without `--locked`, which writes the lock anew; else bring the old input back"
    )


class LaunchError(Error):
    """An enclave cannot be started as asked."""

    code = "launch"
    remedy = "change the option that the message names; `enclave run --dry-run` shows all that does not fit at once"


class NotEnoughMemoryError(LaunchError):
    """The enclave's memory cannot hold its image and boot it."""

    code = "memory"
    remedy = "give more with `--memory`, or leave it at `auto`; if the machine has too little, stop something"


class NotEnoughHugePagesError(NotEnoughMemoryError):
    """Too few huge pages are free for an enclave of the driver's."""

    code = "huge-pages"
    remedy = "raise `memory_mib` in `allocator.yaml` and run `enclave allocate`, or end another enclave"


class ImageTooLargeError(LaunchError):
    """The image is larger than a local machine can boot."""

    code = "image-too-large"
    remedy = "make the image smaller: `enclave describe` shows what each section takes"


class BootError(Error):
    """The enclave ended, or stayed silent, before its init said that it is alive."""

    code = "boot"
    remedy = "run it with `--debug` to see its console; `enclave lint F.eif` finds most causes"


class HeartbeatError(BootError):
    """Nothing went wrong that can be seen, but the enclave's init never said that it is alive."""

    code = "heartbeat"
    remedy = "run it with `--debug` to see how far it came; on a busy machine it may only have been slow"


class GuestError(Error):
    """The enclave's init reported a failure, or ended without a word."""

    code = "guest"
    remedy = "run it with `--debug` to see its console: its last lines tell what went wrong inside"


class PanicError(GuestError):
    """The enclave's kernel gave up."""

    code = "panic"
    remedy = "run it with `--debug`: the console shows why; `enclave lint F.eif` finds what a kernel lacks"


class GuestMemoryError(GuestError):
    """The enclave had not enough memory to go on."""

    code = "guest-memory"
    remedy = "give the enclave more with `--memory`"


class AllocationError(Error):
    """Memory and CPUs cannot be set aside for enclaves; what there was before is there again."""

    code = "allocation"
    remedy = "`enclave doctor --carrier nitro` shows CPUs and huge pages; change `allocator.yaml` to what there is"


class AllocatorConfigError(FormatError):
    """An `allocator.yaml` that is none."""

    code = "allocator-config"
    remedy = "it is `---`, then `memory_mib: 512` and either `cpu_count: 2` or `cpu_pool: 2,3`"


class NoEnclaveError(Error):
    """No enclave has that name or id, or it has ended."""

    code = "no-enclave"
    remedy = "`enclave ps --all` shows all that run and the last that ended"


class ControlError(Error):
    """The process of an enclave does not answer, or not as it should."""

    code = "control"
    remedy = (
        "`enclave ps` shows whether it still runs; if it hangs, end its process (its pid is in `enclave ps --json`)"
    )


class LabError(Error):
    """A lab's parent machine cannot be started, or does not do what it should."""

    code = "lab"
    remedy = "`enclave lab status` shows what runs, `enclave lab logs` what the parent's kernel and the hypervisor say"


class NoLabError(LabError):
    """No lab of that name is up."""

    code = "no-lab"
    remedy = "`enclave lab up` starts one"


class CarrierError(Error):
    """What carries the enclave (QEMU, KVM, a driver) failed."""

    code = "carrier"
    remedy = "read what it said itself; `enclave doctor` shows what this machine can do"


class DriverError(CarrierError):
    """The driver behind /dev/nitro_enclaves, or its device, refused a step.

    ``number`` is what it answered: an errno, or one of the driver's own from 256 on, which strerror does not know.
    """

    code = "driver"
    remedy = "look at the number: those from 256 on have a code of their own here; for others, the kernel's log tells"
    number: int = 0
    name: ClassVar[str] = ""


class VcpuAlreadyUsedError(DriverError):
    """The CPU was given to this enclave before."""

    code = "ne-vcpu-already-used"
    remedy = "name each CPU once, or let the driver choose: CPU 0 means any"
    name = "NE_ERR_VCPU_ALREADY_USED"
    number = 256


class VcpuNotInCpuPoolError(DriverError):
    """The CPU is not in the pool for enclaves, or another enclave has it."""

    code = "ne-vcpu-not-in-cpu-pool"
    remedy = "`enclave doctor` shows the pool; `enclave allocate` changes it while no enclave runs"
    name = "NE_ERR_VCPU_NOT_IN_CPU_POOL"
    number = 257


class VcpuInvalidCpuCoreError(DriverError):
    """The driver does not know the CPU's core."""

    code = "ne-vcpu-invalid-cpu-core"
    remedy = "make the pool anew with `enclave allocate`: CPUs may have been added or removed since"
    name = "NE_ERR_VCPU_INVALID_CPU_CORE"
    number = 258


class InvalidMemRegionSizeError(DriverError):
    """The size of a memory region is not a multiple of 2 MiB."""

    code = "ne-invalid-mem-region-size"
    remedy = "give away whole pages of 2 MiB or more"
    name = "NE_ERR_INVALID_MEM_REGION_SIZE"
    number = 259


class InvalidMemRegionAddrError(DriverError):
    """A memory region does not lie within the program's own memory."""

    code = "ne-invalid-mem-region-addr"
    remedy = "give an address that mmap returned, and no more than was mapped"
    name = "NE_ERR_INVALID_MEM_REGION_ADDR"
    number = 260


class UnalignedMemRegionAddrError(DriverError):
    """A memory region does not begin on a multiple of 2 MiB."""

    code = "ne-unaligned-mem-region-addr"
    remedy = "map it with MAP_HUGETLB, which aligns it"
    name = "NE_ERR_UNALIGNED_MEM_REGION_ADDR"
    number = 261


class MemRegionAlreadyUsedError(DriverError):
    """A memory region overlaps one that this enclave has already."""

    code = "ne-mem-region-already-used"
    remedy = "give each page away once"
    name = "NE_ERR_MEM_REGION_ALREADY_USED"
    number = 262


class MemNotHugePageError(DriverError):
    """A memory region is not backed by pages of hugetlb; transparent huge pages do not count."""

    code = "ne-mem-not-huge-page"
    remedy = "map it with MAP_HUGETLB, and reserve pages with `enclave allocate`"
    name = "NE_ERR_MEM_NOT_HUGE_PAGE"
    number = 263


class MemDifferentNumaNodeError(DriverError):
    """Memory and CPUs are of different NUMA nodes."""

    code = "ne-mem-different-numa-node"
    remedy = "reserve huge pages on the node of the CPU pool: `enclave allocate` does"
    name = "NE_ERR_MEM_DIFFERENT_NUMA_NODE"
    number = 264


class MemMaxRegionsError(DriverError):
    """The memory is in more pieces than the device takes."""

    code = "ne-mem-max-regions"
    remedy = "reserve larger huge pages, early after boot, so that fewer are needed"
    name = "NE_ERR_MEM_MAX_REGIONS"
    number = 265


class NoMemRegionsAddedError(DriverError):
    """The enclave was started without memory."""

    code = "ne-no-mem-regions-added"
    remedy = "donate memory before the start"
    name = "NE_ERR_NO_MEM_REGIONS_ADDED"
    number = 266


class NoVcpusAddedError(DriverError):
    """The enclave was started without a CPU."""

    code = "ne-no-vcpus-added"
    remedy = "add CPUs before the start"
    name = "NE_ERR_NO_VCPUS_ADDED"
    number = 267


class EnclaveMemMinSizeError(DriverError):
    """The enclave was started with less than 64 MiB of memory."""

    code = "ne-enclave-mem-min-size"
    remedy = "give it at least 64 MiB"
    name = "NE_ERR_ENCLAVE_MEM_MIN_SIZE"
    number = 268


class FullCoresNotUsedError(DriverError):
    """The enclave has only some of the threads of a core."""

    code = "ne-full-cores-not-used"
    remedy = "give it whole cores: an even number of CPUs where cores have two threads"
    name = "NE_ERR_FULL_CORES_NOT_USED"
    number = 269


class NotInInitStateError(DriverError):
    """The enclave was started before: nothing can be added to it any more."""

    code = "ne-not-in-init-state"
    remedy = "close it and create another"
    name = "NE_ERR_NOT_IN_INIT_STATE"
    number = 270


class InvalidVcpuError(DriverError):
    """There is no CPU of that number."""

    code = "ne-invalid-vcpu"
    remedy = "`lscpu -e` lists the numbers"
    name = "NE_ERR_INVALID_VCPU"
    number = 271


class NoCpusAvailInPoolError(DriverError):
    """No CPU is left in the pool for enclaves, or there is no pool."""

    code = "ne-no-cpus-avail-in-pool"
    remedy = "`enclave allocate` makes a pool; end an enclave to get its CPUs back"
    name = "NE_ERR_NO_CPUS_AVAIL_IN_POOL"
    number = 272


class InvalidPageSizeError(DriverError):
    """The pages of a memory region are of no size that can be donated."""

    code = "ne-invalid-page-size"
    remedy = "use huge pages of 2 MiB or 1 GiB, each region beginning where a page does"
    name = "NE_ERR_INVALID_PAGE_SIZE"
    number = 273


class InvalidFlagValueError(DriverError):
    """A flag has a value that the driver does not know."""

    code = "ne-invalid-flag-value"
    remedy = "leave the flag out: this driver may be older than the program"
    name = "NE_ERR_INVALID_FLAG_VALUE"
    number = 274


class InvalidEnclaveCidError(DriverError):
    """No enclave can have that CID."""

    code = "ne-invalid-enclave-cid"
    remedy = "take a CID from 4 on and below 0xffffffff; 0 lets the hypervisor choose"
    name = "NE_ERR_INVALID_ENCLAVE_CID"
    number = 275


class ProtocolError(Error):
    """A peer (guest, QEMU, init) broke the protocol spoken with it."""

    code = "protocol"
    remedy = "run it with `--debug` and look at its console: a peer that breaks the protocol is broken, or hostile"


class VirtqueueError(ProtocolError):
    """The guest's driver made a virtqueue that breaks the rules: the device is broken until reset."""

    code = "virtqueue"
    remedy = "the guest's kernel is broken or hostile: try another one"


class EnclaveConnectionError(Error):
    """A connection into the enclave was refused or timed out."""

    code = "connection"
    remedy = "check with `enclave ps` that it runs, and that something in it listens at that port"


class EnclaveRefusedError(EnclaveConnectionError):
    """Nobody in the enclave listens at that port."""

    code = "refused"
    remedy = "check the port, and that the application in the enclave listens on vsock"


class RuntimeInstallError(Error):
    """The runtime could not be installed."""

    code = "runtime"
    remedy = "try again; if a package fails, `docs/runtime.md` says how to use a QEMU and kernel of your own"


class MissingError(Error):
    """This machine lacks something; the hint says what and how to get it."""

    code = "missing"
    remedy = "the hint says what to install; `enclave doctor` shows all that is missing"


class NoQemuError(MissingError):
    """No usable QEMU."""

    code = "no-qemu"
    remedy = "`enclave runtime install`, or name one with `--qemu`"


class NoDockerError(MissingError):
    """No docker daemon answers."""

    code = "no-docker"
    remedy = "start the daemon, or use a source that needs none: `docker://`, `oci:`, `docker-archive:`"


class NoKernelError(MissingError):
    """No guest kernel, or not the modules that it needs."""

    code = "no-kernel"
    remedy = "`enclave runtime install`, or name one with `--kernel`"


class UnsupportedHostError(MissingError):
    """The runtime cannot be installed on a system like this one; the hint says what to install by hand."""

    code = "unsupported-host"
    remedy = "install QEMU 10.2 or newer and a kernel by hand, and name them with `--qemu` and `--kernel`"


class OfflineError(RuntimeInstallError):
    """The package mirror cannot be reached."""

    code = "offline"
    remedy = "check the network and the proxy settings"


class AttestationError(Error):
    """An attestation document that is not accepted: damaged, not genuine, or not as the policy wants it."""

    code = "attestation"
    remedy = "`enclave verify --inspect` shows what the document says, without trusting it"


class DocumentError(AttestationError):
    """The bytes are no attestation document: whoever made them broke a rule of the format."""

    code = "document"
    remedy = "check that the document was copied whole; `enclave verify --inspect` shows what can be read of it"


class DocumentTooLargeError(DocumentError):
    """More bytes than any document has."""

    code = "document-too-large"


class CborTruncatedError(DocumentError):
    """The CBOR ends before its lengths say, or a length is more than there are bytes."""

    code = "cbor-truncated"


class CborMalformedError(DocumentError):
    """Bytes that are no CBOR, or CBOR of a kind that no document has: chunked strings, text that is not UTF-8."""

    code = "cbor-malformed"


class CborDepthError(DocumentError):
    """Arrays and maps in one another, deeper than any document has them."""

    code = "cbor-depth"


class TrailingBytesError(DocumentError):
    """Bytes after the end of the document, or of a part of it."""

    code = "trailing-bytes"


class WrongTagError(DocumentError):
    """A CBOR tag other than COSE_Sign1's, or a tag where none may stand."""

    code = "wrong-tag"


class NotCoseSign1Error(DocumentError):
    """Not an array of the four parts of COSE_Sign1."""

    code = "not-cose-sign1"


class ProtectedHeaderError(DocumentError):
    """The protected header is not a byte string with the algorithm in it and nothing else."""

    code = "bad-protected"


class AlgorithmError(DocumentError):
    """Signed with another algorithm than ES384."""

    code = "bad-alg"


class UnprotectedHeaderError(DocumentError):
    """The unprotected header is not an empty map."""

    code = "unprotected-not-empty"


class PayloadError(DocumentError):
    """No payload, or one of a size that no document has."""

    code = "bad-payload"


class SignatureLengthError(DocumentError):
    """The signature is not 96 bytes, R and S."""

    code = "bad-signature-length"


class PayloadNotMapError(DocumentError):
    """The payload is not a map."""

    code = "payload-not-map"


class DuplicateKeyError(DocumentError):
    """A map has a key twice: two readers could see two documents."""

    code = "duplicate-key"


class MissingFieldError(DocumentError):
    """A field that every document has is not there."""

    code = "missing-field"


class UnknownFieldError(DocumentError):
    """A field that is not known here."""

    code = "unknown-field"


class AmbiguousKindError(DocumentError):
    """The PCRs of an enclave and those of a NitroTPM in one document."""

    code = "ambiguous-kind"


class FieldTypeError(DocumentError):
    """A field of another CBOR type than its own."""

    code = "bad-type"


class FieldLengthError(DocumentError):
    """A field that is longer or shorter than it may be."""

    code = "bad-length"


class ModuleIdError(DocumentError):
    """No module id."""

    code = "bad-module-id"


class DigestError(DocumentError):
    """Measured with another hash than SHA384."""

    code = "bad-digest"


class TimestampError(DocumentError):
    """No time at which the document was made."""

    code = "bad-timestamp"


class PcrsError(DocumentError):
    """No PCRs, or more than there can be."""

    code = "bad-pcrs"


class PcrIndexError(DocumentError):
    """A PCR whose number is not one of 0 to 31."""

    code = "bad-pcr-index"


class PcrLengthError(DocumentError):
    """A PCR that is not 48 bytes."""

    code = "bad-pcr-length"


class CertificateBundleError(DocumentError):
    """No certificate chain, or one longer than any document has."""

    code = "bad-cabundle"


class TrustError(AttestationError):
    """The document's key is not vouched for by a trusted root at that time."""

    code = "untrusted"
    remedy = "do not trust it: its certificates do not lead to a root that you named"


class UntrustedRootError(TrustError):
    """The chain begins with a root that is not trusted."""

    code = "untrusted-root"
    remedy = "a document of a local enclave needs `--dev-root`, one of another authority `--root`"


class ChainCertificateError(TrustError):
    """A certificate of the chain is damaged, or not an X.509 version 3 certificate."""

    code = "bad-certificate"


class KeyTypeError(TrustError):
    """A certificate's key is not on P-384."""

    code = "bad-key-type"


class CertificateAlgorithmError(TrustError):
    """A certificate is signed with another algorithm than ECDSA with SHA-384."""

    code = "bad-cert-sigalg"


class IssuerMismatchError(TrustError):
    """A certificate was not issued by the one before it, by name."""

    code = "issuer-mismatch"


class SelfIssuedError(TrustError):
    """A certificate below the root names itself as its issuer."""

    code = "self-issued"


class CertificateSignatureError(TrustError):
    """A certificate's signature is not by its issuer's key."""

    code = "bad-cert-signature"


class CertificateTimeError(TrustError):
    """A certificate is not valid at the time that is asked about."""

    code = "cert-not-valid-at"
    remedy = "documents are valid for some hours: ask for a new one, or judge an old one with `--at document`"


class CriticalExtensionError(TrustError):
    """A certificate has a critical extension that is not understood."""

    code = "unknown-critical-extension"


class CaBasicConstraintsError(TrustError):
    """An issuer's certificate is not a CA's."""

    code = "ca-basic-constraints"


class CaKeyUsageError(TrustError):
    """An issuer's key may not sign certificates."""

    code = "ca-key-usage"


class PathLengthError(TrustError):
    """More CAs below a certificate than it allows."""

    code = "path-length"


class LeafKeyUsageError(TrustError):
    """The last certificate's key may not sign."""

    code = "leaf-key-usage"


class LeafBasicConstraintsError(TrustError):
    """The last certificate is a CA's."""

    code = "leaf-basic-constraints"


class ModuleMismatchError(TrustError):
    """The document names another module than its certificate."""

    code = "module-mismatch"


class TimestampOutsideLeafError(TrustError):
    """The document was made at a time at which its certificate was not valid."""

    code = "timestamp-outside-leaf"


class DocumentSignatureError(AttestationError):
    """The document's signature does not hold."""

    code = "document-signature"
    remedy = "do not trust it: it was changed, or the key of its certificate did not sign it"


class SignatureRangeError(DocumentSignatureError):
    """R or S is no number that a signature can have."""

    code = "signature-out-of-range"


class BadSignatureError(DocumentSignatureError):
    """The signature is not by the certificate's key, or not over these bytes."""

    code = "bad-signature"


class PolicyError(AttestationError):
    """Genuine, but not what the policy wants; or a policy that would let anything pass."""

    code = "policy"
    remedy = "compare what it says, `enclave verify --inspect`, with what you asked for"


class NoReferenceValuesError(PolicyError):
    """A policy that names no PCR: every enclave would pass."""

    code = "no-reference-values"
    remedy = "name what you expect: `--eif`, `--lock` or `--pcr`; or `--any-measurement`, if you mean that"


class ZeroPcrError(PolicyError):
    """A policy that expects a PCR of zeros: every enclave in debug mode would pass."""

    code = "zero-pcr"
    remedy = "it is of an enclave in debug mode: run it without, or say `--allow-debug` if you mean that"


class KindMismatchError(PolicyError):
    """A document of the other kind: an enclave's where a NitroTPM's is expected, or the reverse."""

    code = "wrong-kind"


class DebugModeError(PolicyError):
    """The enclave runs in debug mode: its parent can look into it."""

    code = "debug-mode"
    remedy = "run the enclave without debug mode, or say `--allow-debug` if you mean that"


class PcrMismatchError(PolicyError):
    """A PCR is not there, or not as expected: another image, role, instance or signer."""

    code = "pcr-mismatch"


class NonceMismatchError(PolicyError):
    """The nonce is not there, or not the one asked for: perhaps an older document, replayed."""

    code = "nonce-mismatch"


class UserDataMismatchError(PolicyError):
    """The user data are not there, or not as expected."""

    code = "user-data-mismatch"


class PublicKeyMismatchError(PolicyError):
    """The public key is not there, or not as expected."""

    code = "public-key-mismatch"


class ModuleIdMismatchError(PolicyError):
    """Another enclave than the one expected."""

    code = "module-id-mismatch"


class InstanceIdMismatchError(PolicyError):
    """An enclave of another instance than the one expected."""

    code = "instance-id-mismatch"


class StaleError(PolicyError):
    """The document was made too long ago, or in the future."""

    code = "stale"
    remedy = "ask for a new document, with a nonce of yours"


class RecipientError(Error):
    """What a KMS encrypted for an enclave cannot be opened with this key. Why is never said."""

    code = "recipient"
    remedy = "check that the answer is for the key in the document, and was copied whole"


class NsmError(Error):
    """The security module did not do what it was asked; ``name`` is its word for why, or "" if it was not reached."""

    code = "nsm"
    remedy = "inside an enclave, see that /dev/nsm is there and that the PCR is not locked"

    def __init__(self, message: str, *, hint: str | None = None, name: str = "") -> None:
        super().__init__(message, hint=hint)
        self.name = name
