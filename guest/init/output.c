/* SPDX-License-Identifier: Apache-2.0 */
/* The buffer between the application's output and the host. Frames leave it only when they were sent whole, so a host
 * that connects anew starts with a whole frame. */
#define _GNU_SOURCE
#include "output.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define LEAST_ROOM 4096 /* fewer bytes are not worth a frame */

/* Make `size` bytes free at the end; the caller has seen to it that they exist. */
static uint8_t *claim(struct output *output, size_t size)
{
    if (sizeof output->bytes - output->end < size) {
        memmove(output->bytes, output->bytes + output->start, output->end - output->start);
        output->sent -= output->start;
        output->end -= output->start;
        output->start = 0;
    }
    return output->bytes + output->end;
}

void output_put(struct output *output, enum frame_type type, const void *payload, size_t size)
{
    uint8_t *frame = claim(output, FRAME_HEADER + size);
    put_header(frame, type, (uint32_t)size);
    if (size)
        memcpy(frame + FRAME_HEADER, payload, size);
    output->end += FRAME_HEADER + size;
}

size_t output_log_room(const struct output *output)
{
    size_t used = output->end - output->start + FRAME_HEADER;
    return used + LEAST_ROOM <= LOG_CAPACITY ? LOG_CAPACITY - used : 0;
}

bool output_document_room(const struct output *output)
{
    return output->end - output->start <= LOG_CAPACITY;
}

ssize_t output_put_from(struct output *output, enum frame_type type, int pipe, size_t room)
{
    uint8_t *frame = claim(output, FRAME_HEADER + room);
    ssize_t got = read(pipe, frame + FRAME_HEADER, room);
    if (got > 0) {
        put_header(frame, type, (uint32_t)got);
        output->end += FRAME_HEADER + (size_t)got;
    }
    return got;
}

bool output_send(struct output *output, int connection)
{
    const uint8_t *from = output->bytes + output->sent;
    ssize_t sent = send(connection, from, output->end - output->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0)
        return errno == EAGAIN || errno == EINTR;
    output->sent += (size_t)sent;
    while (output->start < output->end) {
        size_t next = output->start + FRAME_HEADER + get_u32(output->bytes + output->start + 1);
        if (next > output->sent)
            break;
        output->start = next;
    }
    return true;
}

void output_rewind(struct output *output)
{
    output->sent = output->start;
}
