# SPDX-License-Identifier: Apache-2.0
"""The hypervisor behind the NE device (``slots.Hypervisor``): slots become enclaves, on any local carrier.

An image that is no image is refused with EINVAL, and why is said in the log. Real hypervisors mostly answer that it has
started, and then nothing is heard of it: whoever waits for a heartbeat waits in vain. Here the reason is worth more.

CIDs count up from 16, as on EC2, so that what was said to one enclave does not reach the next.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from enclavekit.enclave.security_module import check_instance_id
from enclavekit.hypervisor.contract import Mode
from enclavekit.lab.donated import Donated
from enclavekit.lab.enclave import Host, LabEnclave, Order
from enclavekit.lab.slots import Answer, Ended, Slot
from enclavekit.linux.nitro_enclaves import NE_ENCLAVE_DEBUG_MODE
from enclavekit.virtio.vsock_packet import PARENT_CID

MAX_ENCLAVES = 4
"""Of one parent, as on EC2."""
FIRST_CID = 16
END_CID = 0xFFFF_FFFF
"""VMADDR_CID_ANY."""


class LabHypervisor:
    """Enclaves of one parent. ``ended`` comes in an enclave's thread. Errors: ``UsageError`` for no instance id."""

    def __init__(self, host: Host, ended: Ended) -> None:
        if host.instance_id is not None:
            check_instance_id(host.instance_id)
        self._host = host
        self._ended = ended
        self._lock = threading.Lock()
        self._enclaves: dict[int, LabEnclave] = {}
        """By their slots' uids: those that boot, run, or are ending."""
        self._next_cid = FIRST_CID
        self._closed = False

    def start(self, slot: Slot, cid: int, flags: int, answer: Answer) -> None:
        """See ``slots.Hypervisor``."""
        try:
            self._start(slot, cid, flags, answer)
        except OSError as error:
            self._host.log(f"slot {slot.uid:#x} does not start: {(error.strerror or str(error)).lower()}")
            answer(-(error.errno or errno.EIO), 0)

    def stop(self, slot: Slot) -> None:
        """See ``slots.Hypervisor``."""
        with self._lock:
            enclave = self._enclaves.get(slot.uid)
        if enclave is not None:
            enclave.stop()

    def free(self, slot: Slot) -> None:
        """See ``slots.Hypervisor``."""
        self.stop(slot)
        try:
            donated = Donated(slot.memory)
            try:
                donated.empty()
            finally:
                donated.close()
        except OSError as error:  # the parent's memory is gone with it
            self._host.log(f"slot {slot.uid:#x}: its memory cannot be given back: {(error.strerror or '').lower()}")

    def close(self) -> None:
        """The parent is gone: all end. Twice does no harm."""
        with self._lock:
            self._closed = True
            enclaves = list(self._enclaves.values())
        for enclave in enclaves:
            enclave.stop()
        for enclave in enclaves:
            enclave.stop(wait=True)

    def _start(self, slot: Slot, cid: int, flags: int, answer: Answer) -> None:
        """With a place and a CID; ``OSError`` says why not."""
        with self._lock:
            if self._closed or len(self._enclaves) >= MAX_ENCLAVES:
                raise OSError(errno.ENOMEM, f"a parent has at most {MAX_ENCLAVES} enclaves")
            if slot.uid in self._enclaves:
                raise OSError(errno.EBUSY, "it runs already")
            chosen = self._choose_cid(cid)
            mode = Mode.DEBUG if flags & NE_ENCLAVE_DEBUG_MODE else Mode.PRODUCTION
            donated = Donated(slot.memory)
            try:
                order = Order(slot.uid, chosen, len(slot.cpus), mode, donated)
                made = LabEnclave(self._host, order, answer, self._when_ended(slot.uid))
            except BaseException:
                donated.close()
                raise
            self._enclaves[slot.uid] = made
            try:
                made.start()
                return
            except RuntimeError:
                pass
        made.stop(wait=True)
        donated.close()
        raise OSError(errno.EAGAIN, "this machine gives no more threads")

    def _choose_cid(self, wanted: int) -> int:
        taken = {enclave.cid for enclave in self._enclaves.values()}
        if not wanted:
            while self._next_cid in taken:
                self._count_up()
            wanted = self._next_cid
            self._count_up()
        if not PARENT_CID < wanted < END_CID:
            raise OSError(errno.EINVAL, f"an enclave cannot have CID {wanted}")
        if wanted in taken:
            raise OSError(errno.EBUSY, f"CID {wanted} is in use")
        return wanted

    def _count_up(self) -> None:
        self._next_cid = self._next_cid + 1 if self._next_cid + 1 < END_CID else FIRST_CID

    def _when_ended(self, uid: int) -> Callable[[bool], None]:
        def on_end(by_itself: bool) -> None:
            with self._lock:
                self._enclaves.pop(uid, None)
            if by_itself:
                self._ended(uid)

        return on_end
