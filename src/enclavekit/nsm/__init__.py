# SPDX-License-Identifier: Apache-2.0
"""The security module from inside an enclave: ``with Nsm() as nsm: document = nsm.attest(nonce=nonce)``.

Needs nothing but cbor2. Shipped too as the distribution enclavekit-nsm, for small images (docs/nsm.md).
"""

from enclavekit.nsm.client import Description, Nsm, Pcr

__all__ = ["Description", "Nsm", "Pcr"]
