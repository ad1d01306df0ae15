/* SPDX-License-Identifier: Apache-2.0 */
/* The frames of the control protocol, docs/init.md: u8 type, u32 payload size, payload; integers big-endian. */
#pragma once

#include <stdint.h>

#define PROTOCOL_VERSION 1
#define FRAME_HEADER 5
#define MAX_PAYLOAD (64 << 10)

enum frame_type {
    FRAME_HELLO = 0x01,  /* u8 protocol version, u8 flags */
    FRAME_STATUS = 0x02, /* u8 kind, u8 value, message */
    FRAME_STDOUT = 0x03, /* bytes */
    FRAME_STDERR = 0x04, /* bytes */
    FRAME_LOST = 0x05,   /* u64 bytes of output that were dropped */
    FRAME_STARTED = 0x06, /* empty: the program runs */
    FRAME_DOCUMENT = 0x07, /* u32 tag, u8 kind, document or message */
    FRAME_ACK = 0x81,    /* empty: the host has the status */
    FRAME_STOP = 0x82,   /* u8 signal, u32 grace in ms */
    FRAME_VALUE = 0x83,  /* u8 size of the name, name, value */
    FRAME_START = 0x84,  /* empty: no more values */
    FRAME_ATTEST = 0x85, /* u32 tag, nonce */
};

enum hello_flag { HELLO_LOGS = 1, HELLO_WAITS = 2, HELLO_ATTESTS = 4 };

enum document_kind { DOCUMENT_GIVEN, DOCUMENT_FAILED };

enum status_kind { STATUS_EXITED, STATUS_SIGNALLED, STATUS_FAILED };

static inline void put_u32(uint8_t *at, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        at[i] = (uint8_t)(value >> (24 - 8 * i));
}

static inline uint32_t get_u32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static inline void put_header(uint8_t *at, enum frame_type type, uint32_t size)
{
    at[0] = (uint8_t)type;
    put_u32(at + 1, size);
}
