# SPDX-License-Identifier: Apache-2.0
"""vsock for host programs: the same code on EC2 and with local enclaves.

    with vsock.connect("web", 5000) as connection:          # into an enclave, by name, id or CID
        connection.sendall(b"hello")

    with vsock.listen(5000) as listener:                    # for what enclaves dial; may come before any enclave
        connection, caller = listener.accept()              # caller.cid is the enclave's

On EC2 these are AF_VSOCK sockets, elsewhere Unix sockets (docs/vsock.md). ``open_connection`` and ``start_server`` are
the same for asyncio.
"""

from enclavekit.vsock.sockets import Caller, Listener, connect, listen
from enclavekit.vsock.streams import open_connection, start_server

__all__ = ["Caller", "Listener", "connect", "listen", "open_connection", "start_server"]
