/* SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "frame.h"

#define MAX_NONCE 1024
#define MAX_DOCUMENT 0x3000 /* what the NSM's driver takes at most */

/* One request for an attestation document, from the host's frame to the answer to it. */
struct attest {
    int pipe;    /* from the process that asks the NSM; -1 while there is none */
    size_t size; /* of the answer so far */
    bool ready;  /* all of it is there */
    uint8_t answer[5 + MAX_DOCUMENT]; /* payload of the frame: tag, kind, document or message */
};

/* Ask, beside the loop, for what a frame wants. False if it breaks the protocol: a bad payload, or one too many. */
bool attest_begin(struct attest *attest, const uint8_t *payload, size_t size);

/* Its pipe has something to read, or has ended. */
void attest_receive(struct attest *attest);

/* Nobody wants it any more. */
void attest_cancel(struct attest *attest);
