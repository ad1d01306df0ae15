/* SPDX-License-Identifier: Apache-2.0 */
/* Attestation documents for the host, from /dev/nsm, with the host's nonce and nothing else in them: docs/init.md.
 *
 * A child process asks, for the NSM may take its time and process 1 must not wait. What the two say to each other is
 * CBOR with few shapes, so it is written and read byte by byte. */
#define _GNU_SOURCE
#include "attest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "init.h"

#define TAG_SIZE 4
#define REQUEST_HEAD "\xa1\x6b" "Attestation" "\xa3\x69" "user_data" "\xf6\x6a" "public_key" "\xf6\x65" "nonce"
#define RESPONSE_HEAD "\xa1\x6b" "Attestation" "\xa1\x68" "document"
#define ERROR_HEAD "\xa1\x65" "Error"

struct nsm_raw { /* linux: include/uapi/linux/nsm.h */
    uint64_t request, request_size, response, response_size;
};
#define NSM_IOCTL_RAW _IOWR(0x0a, 0, struct nsm_raw)

static _Noreturn void reply(int report, enum document_kind kind, const void *bytes, size_t size)
{
    uint8_t first = (uint8_t)kind;
    /* The pipe has room for all of it. */
    if (write(report, &first, 1) == 1 && write(report, bytes, size) == (ssize_t)size)
        _exit(0);
    _exit(1);
}

static _Noreturn void refuse(int report, const char *what, int error)
{
    char message[256];
    int length = snprintf(message, sizeof message, error ? "%s: %s" : "%s", what, strerror(error));
    reply(report, DOCUMENT_FAILED, message, length < (int)sizeof message ? (size_t)length : sizeof message - 1);
}

/* A byte string's or text's head: its size, and where its bytes begin, or 0. `major` is 0x40 or 0x60. */
static size_t item(const uint8_t *bytes, size_t have, uint8_t major, size_t *size)
{
    size_t head = 0;
    if (have >= 1 && bytes[0] >= major && bytes[0] < major + 24) {
        *size = bytes[0] - major;
        head = 1;
    } else if (have >= 2 && bytes[0] == major + 24) {
        *size = bytes[1];
        head = 2;
    } else if (have >= 3 && bytes[0] == major + 25) {
        *size = (size_t)bytes[1] << 8 | bytes[2];
        head = 3;
    }
    return head && *size <= have - head ? head : 0;
}

static bool starts(const uint8_t *bytes, size_t have, const char *head, size_t size)
{
    return have >= size && !memcmp(bytes, head, size);
}

static _Noreturn void ask(int report, const uint8_t *nonce, size_t size)
{
    static uint8_t request[sizeof REQUEST_HEAD - 1 + 3 + MAX_NONCE], response[MAX_DOCUMENT];
    size_t at = sizeof REQUEST_HEAD - 1;
    memcpy(request, REQUEST_HEAD, at);
    if (size >= 256) {
        request[at++] = 0x59;
        request[at++] = (uint8_t)(size >> 8);
    } else if (size >= 24) {
        request[at++] = 0x58;
    }
    request[at++] = (uint8_t)(size >= 24 ? size : 0x40 + size);
    memcpy(request + at, nonce, size);

    int fd = open("/dev/nsm", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        refuse(report, "cannot open /dev/nsm", errno);
    struct nsm_raw raw = {(uintptr_t)request, at + size, (uintptr_t)response, sizeof response};
    if (ioctl(fd, NSM_IOCTL_RAW, &raw) < 0)
        refuse(report, "the NSM does not answer", errno);
    size_t have = raw.response_size < sizeof response ? raw.response_size : sizeof response, head, length;
    const uint8_t *rest = response + sizeof RESPONSE_HEAD - 1;
    if (starts(response, have, RESPONSE_HEAD, sizeof RESPONSE_HEAD - 1) &&
        (head = item(rest, have - (sizeof RESPONSE_HEAD - 1), 0x40, &length)))
        reply(report, DOCUMENT_GIVEN, rest + head, length);
    rest = response + sizeof ERROR_HEAD - 1;
    if (starts(response, have, ERROR_HEAD, sizeof ERROR_HEAD - 1) &&
        (head = item(rest, have - (sizeof ERROR_HEAD - 1), 0x60, &length)) && length < 64) {
        char message[128];
        snprintf(message, sizeof message, "the NSM answers %.*s", (int)length, (const char *)rest + head);
        refuse(report, message, 0);
    }
    refuse(report, "the NSM's answer is not one", 0);
}

/* The host's connection must not stay open because this process does. */
static void keep_only(int fd)
{
    syscall(SYS_close_range, STDERR_FILENO + 1, fd - 1, 0);
    syscall(SYS_close_range, fd + 1, ~0U, 0);
}

static void failed(struct attest *attest, const char *what)
{
    int length = snprintf((char *)attest->answer + TAG_SIZE + 1, 256, "%s: %s", what, strerror(errno));
    attest->answer[TAG_SIZE] = DOCUMENT_FAILED;
    attest->size = TAG_SIZE + 1 + (size_t)length;
    attest->ready = true;
}

bool attest_begin(struct attest *attest, const uint8_t *payload, size_t size)
{
    if (size <= TAG_SIZE || size > TAG_SIZE + MAX_NONCE || attest->pipe >= 0 || attest->ready)
        return false;
    memcpy(attest->answer, payload, TAG_SIZE);
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0) {
        failed(attest, "cannot make a pipe");
        return true;
    }
    pid_t child = fork();
    if (child < 0)
        failed(attest, "cannot fork");
    if (child == 0) {
        keep_only(ends[1]);
        ask(ends[1], payload + TAG_SIZE, size - TAG_SIZE);
    }
    close(ends[1]);
    if (child < 0) {
        close(ends[0]);
        return true;
    }
    attest->pipe = ends[0];
    attest->size = TAG_SIZE;
    return true;
}

void attest_receive(struct attest *attest)
{
    ssize_t got = read(attest->pipe, attest->answer + attest->size, sizeof attest->answer - attest->size);
    if (got > 0) {
        attest->size += (size_t)got;
        if (attest->size < sizeof attest->answer)
            return;
    }
    close(attest->pipe);
    attest->pipe = -1;
    if (attest->size <= TAG_SIZE) {
        errno = EIO;
        failed(attest, "the process that asks the NSM has ended");
    }
    attest->ready = true;
}

void attest_cancel(struct attest *attest)
{
    if (attest->pipe >= 0)
        close(attest->pipe);
    attest->pipe = -1;
    attest->ready = false;
    attest->size = 0;
}
