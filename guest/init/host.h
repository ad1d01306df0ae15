/* SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "attest.h"
#include "config.h"
#include "frame.h"

/* The control connection. The host is not trusted: what it sends is bounded, and it never makes init wait. */
struct host {
    int listener;
    int connection; /* -1 while there is none */
    size_t have;    /* bytes of the frame that is coming in */
    bool attests;   /* as the image's configuration says */
    struct attest attest;
    const struct config *waiting; /* for launch values that it declares; NULL: they are over, or there are none */
    uint8_t frame[FRAME_HEADER + MAX_PAYLOAD];
};

/* What the host wants. */
struct orders {
    bool ack;
    bool stop;
    bool start;
    uint8_t stop_signal; /* 0: the image's own */
    uint32_t grace_ms;
};

/* Take a new connection, which replaces the old one, and greet it. False if there is none after all. */
bool host_accept(struct host *host, bool logs);

/* Read once. False if the connection is to be closed: the other side did so, or it broke the protocol. */
bool host_receive(struct host *host, struct orders *orders);

void host_close(struct host *host);
