/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vsock: the heartbeat to port 9000 of the parent, and the control connection that the parent makes to port 9001 here.
 *
 * The parent is not trusted: what it sends is bounded and changes nothing but the end of the application, and nothing
 * here waits for it for longer than said.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "init.h"

#define PARENT_CID 3
#define HEARTBEAT_PORT 9000
#define HEARTBEAT 0xb7
#define HEARTBEAT_TIMEOUT_S 60
#define CONTROL_PORT 9001
#define DEVICE_TIMEOUT_MS 2000      /* from the modules' loading to the device's being there */
#define FINISH_TIMEOUT_MS 2000

#define FRAME_HEADER 5              /* type u8, payload length u32 big-endian */
#define MAX_INCOMING 64             /* every message of the host is short; longer payloads are skipped */
#define OUTGOING_SIZE 65536
#define RESERVED (FRAME_HEADER * 4 + 64 + FAIL_MESSAGE_SIZE) /* kept free of output for hello, lost and status */

enum frame_type { HELLO = 0x01, STATUS = 0x02, STDOUT = 0x03, STDERR = 0x04, LOST = 0x05, ACK = 0x81, STOP = 0x82 };

static int listener = -1, connection = -1;
static bool logs, acknowledged;

/* Outgoing bytes: only whole frames are ever dropped, and only when a connection ends in the middle of one. */
static uint8_t outgoing[OUTGOING_SIZE];
static size_t outgoing_size;
static size_t cut;                  /* bytes of the first frame that have gone already */

static uint8_t incoming[FRAME_HEADER + MAX_INCOMING];
static size_t incoming_size;
static uint32_t skip;               /* bytes of a payload that is not wanted */

static uint32_t be32(const uint8_t *p) { return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3]; }

static void put_be32(uint8_t *p, uint32_t value)
{
    p[0] = (uint8_t)(value >> 24);
    p[1] = (uint8_t)(value >> 16);
    p[2] = (uint8_t)(value >> 8);
    p[3] = (uint8_t)value;
}

static struct sockaddr_vm address(unsigned int cid, unsigned int port)
{
    return (struct sockaddr_vm){ .svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port };
}

/* A device that was probed just now may need a moment. */
static bool not_yet(int error)
{
    return error == EAFNOSUPPORT || error == ENODEV || error == EADDRNOTAVAIL || error == ENETUNREACH;
}

static void pause_ms(long ms)
{
    struct timespec time = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000 };
    nanosleep(&time, NULL);
}

static int vsock(int flags)
{
    uint64_t until = now_ms() + DEVICE_TIMEOUT_MS;
    for (;;) {
        int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
        if (fd >= 0)
            return fd;
        if (!not_yet(errno) || now_ms() >= until)
            fail(errno, "cannot make a vsock socket");
        pause_ms(10);
    }
}

void control_listen(void)
{
    struct sockaddr_vm here = address(VMADDR_CID_ANY, CONTROL_PORT);
    int fd = vsock(SOCK_NONBLOCK);
    if (bind(fd, (struct sockaddr *)&here, sizeof here) || listen(fd, 4))
        fail(errno, "cannot listen on vsock port %d", CONTROL_PORT);
    listener = fd;
}

void heartbeat(void)
{
    struct sockaddr_vm parent = address(PARENT_CID, HEARTBEAT_PORT);
    struct timeval timeout = { .tv_sec = HEARTBEAT_TIMEOUT_S };
    uint64_t until = now_ms() + DEVICE_TIMEOUT_MS;
    uint8_t byte = HEARTBEAT;
    int fd;

    for (;;) {
        fd = vsock(0);
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
        if (!connect(fd, (struct sockaddr *)&parent, sizeof parent))
            break;
        if (!not_yet(errno) || now_ms() >= until)
            fail(errno, "heartbeat: cannot connect to CID %d port %d", PARENT_CID, HEARTBEAT_PORT);
        close(fd);
        pause_ms(10);
    }
    if (send(fd, &byte, 1, MSG_NOSIGNAL) != 1)
        fail(errno, "heartbeat: cannot send");
    byte = 0;
    ssize_t got = recv(fd, &byte, 1, 0);
    if (got != 1)
        fail(got ? errno : 0, "heartbeat: no answer");
    if (byte != HEARTBEAT)
        fail(0, "heartbeat: got 0x%02x, expected 0x%02x", byte, HEARTBEAT);
    close(fd);
}

bool control_is_listening(void) { return listener >= 0; }
int control_listener(void) { return listener; }
int control_connection(void) { return connection; }
bool control_wants_write(void) { return connection >= 0 && outgoing_size; }
void control_hello_logs(bool wanted) { logs = wanted; }

static void frame(enum frame_type type, const uint8_t *first, size_t first_size, const uint8_t *rest, size_t rest_size)
{
    if (outgoing_size + FRAME_HEADER + first_size + rest_size > OUTGOING_SIZE)
        return;                     /* cannot be: room is kept */
    uint8_t *at = outgoing + outgoing_size;
    *at++ = (uint8_t)type;
    put_be32(at, (uint32_t)(first_size + rest_size));
    at += 4;
    memcpy(at, first, first_size);
    memcpy(at + first_size, rest, rest_size);
    outgoing_size += FRAME_HEADER + first_size + rest_size;
}

/* Take out the first frame, or what is left of it. */
static void drop_first(void)
{
    size_t size = FRAME_HEADER + be32(outgoing + 1);
    memmove(outgoing, outgoing + size, outgoing_size - size);
    outgoing_size -= size;
    cut = 0;
}

static void disconnect(void)
{
    close(connection);
    connection = -1;
    incoming_size = 0;
    skip = 0;
    if (cut)                        /* the other end has part of it; the next one must start with a whole frame */
        drop_first();
}

void control_accept(void)
{
    struct sockaddr_vm peer;
    socklen_t size = sizeof peer;
    uint8_t hello[FRAME_HEADER + 2] = { HELLO, 0, 0, 0, 2, 1, logs };
    int fd = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    /* Only the parent, and one connection at a time: the newest, for the one before may be a dead host's. */
    if (peer.svm_cid != PARENT_CID) {
        close(fd);
        return;
    }
    if (connection >= 0)
        disconnect();
    connection = fd;
    if (send(connection, hello, sizeof hello, MSG_NOSIGNAL) != sizeof hello)
        disconnect();
}

void control_write(void)
{
    while (connection >= 0 && outgoing_size) {
        size_t size = FRAME_HEADER + be32(outgoing + 1);
        ssize_t sent = send(connection, outgoing + cut, size - cut, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno != EAGAIN && errno != EINTR)
                disconnect();
            return;
        }
        cut += (size_t)sent;
        if (cut == size)
            drop_first();
    }
}

bool control_read(struct stop_request *request)
{
    bool stop = false;
    for (;;) {
        uint8_t data[256];
        ssize_t got = recv(connection, data, sizeof data, 0);
        if (got < 0 && (errno == EAGAIN || errno == EINTR))
            return stop;
        if (got <= 0) {
            disconnect();
            return stop;
        }
        for (ssize_t i = 0; i < got; i++) {
            if (skip) {
                skip--;
                continue;
            }
            incoming[incoming_size++] = data[i];
            if (incoming_size < FRAME_HEADER)
                continue;
            uint32_t length = be32(incoming + 1);
            if (length > MAX_INCOMING) {
                skip = length;
                incoming_size = 0;
                continue;
            }
            if (incoming_size < FRAME_HEADER + length)
                continue;
            if (incoming[0] == ACK)
                acknowledged = true;
            if (incoming[0] == STOP && length >= 5 && incoming[FRAME_HEADER] <= 64) {
                *request = (struct stop_request){ incoming[FRAME_HEADER], be32(incoming + FRAME_HEADER + 1) };
                stop = true;
            }
            incoming_size = 0;
        }
    }
}

size_t control_room(void)
{
    size_t used = outgoing_size + RESERVED + FRAME_HEADER;
    return used < OUTGOING_SIZE ? OUTGOING_SIZE - used : 0;
}

void control_output(bool is_stderr, const uint8_t *data, size_t size)
{
    frame(is_stderr ? STDERR : STDOUT, data, size, NULL, 0);
    control_write();
}

void control_lost(uint64_t bytes)
{
    uint8_t count[8];
    put_be32(count, (uint32_t)(bytes >> 32));
    put_be32(count + 4, (uint32_t)bytes);
    frame(LOST, count, sizeof count, NULL, 0);
}

void control_finish(enum status_kind kind, int value, const char *message)
{
    uint8_t status[2] = { (uint8_t)kind, (uint8_t)value };
    uint64_t until = now_ms() + FINISH_TIMEOUT_MS;
    struct stop_request ignored;

    frame(STATUS, status, sizeof status, (const uint8_t *)message, strlen(message));
    for (uint64_t now = now_ms(); !acknowledged && now < until; now = now_ms()) {
        struct pollfd polled[2] = {
            { .fd = listener, .events = POLLIN },
            { .fd = connection, .events = POLLIN | (control_wants_write() ? POLLOUT : 0) },
        };
        if (poll(polled, 2, (int)(until - now)) < 0 && errno != EINTR)
            return;
        if (polled[0].revents)
            control_accept();
        if (connection >= 0 && polled[1].revents & (POLLIN | POLLHUP | POLLERR))
            control_read(&ignored);
        control_write();
    }
}
