/* SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "attest.h"
#include "frame.h"

#define LOG_CAPACITY (64 << 10)
#define LAST_WORDS 1024 /* room that log output leaves for the count of what was lost and for the status */

#define DOCUMENT_ROOM (FRAME_HEADER + 5 + MAX_DOCUMENT) /* and for one attestation document */

/* Whole frames on their way to the host, kept while it is away or slow: [start, end), of which [start, sent) has gone
 * over the present connection. `start` is always the beginning of a frame. */
struct output {
    size_t start, sent, end;
    uint8_t bytes[LOG_CAPACITY + LAST_WORDS + DOCUMENT_ROOM];
};

static inline bool output_pending(const struct output *output)
{
    return output->sent < output->end;
}

/* Append a frame; the caller has seen to it that there is room. */
void output_put(struct output *output, enum frame_type type, const void *payload, size_t size);

/* The longest payload of log output that there is room for now; 0 if not even for a useful one. */
size_t output_log_room(const struct output *output);

/* Whether a document's frame has room, however much log output waits. */
bool output_document_room(const struct output *output);

/* Append what one read() from a pipe yields, at most `room` bytes, as a frame. Returns read()'s result. */
ssize_t output_put_from(struct output *output, enum frame_type type, int pipe, size_t room);

/* Send what the connection takes now. False if it is broken. */
bool output_send(struct output *output, int connection);

/* The connection is gone: the next one begins with the frame that this one did not get whole. */
void output_rewind(struct output *output);
