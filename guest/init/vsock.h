/* SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* The enclave's CID is its own; the parent is always this one, seen from inside. */
#define PARENT_CID 3

/* A socket that listens for the host on the control port. */
int listen_for_host(void);

/* Tell the parent that the enclave lives, and wait for its answer. */
void send_heartbeat(void);
