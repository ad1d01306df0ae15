/* SPDX-License-Identifier: Apache-2.0 */
/* The control connection, on which the host dials in: docs/init.md. */
#define _GNU_SOURCE
#include "host.h"

#include <errno.h>
#include <linux/vm_sockets.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "launch.h"
#include "vsock.h"

bool host_accept(struct host *host, bool logs)
{
    struct sockaddr_vm peer = {0};
    socklen_t size = sizeof peer;
    int fd = accept4(host->listener, (struct sockaddr *)&peer, &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return false;
    uint8_t hello[FRAME_HEADER + 2];
    put_header(hello, FRAME_HELLO, 2);
    hello[FRAME_HEADER] = PROTOCOL_VERSION;
    hello[FRAME_HEADER + 1] = (uint8_t)((logs ? HELLO_LOGS : 0) | (host->waiting ? HELLO_WAITS : 0) |
                                        (host->attests ? HELLO_ATTESTS : 0));
    /* A host that has no room for seven bytes on a new connection will not read anything else. */
    if (peer.svm_family != AF_VSOCK || peer.svm_cid != PARENT_CID ||
        send(fd, hello, sizeof hello, MSG_DONTWAIT | MSG_NOSIGNAL) != sizeof hello) {
        close(fd);
        return false;
    }
    host_close(host);
    host->connection = fd;
    return true;
}

void host_close(struct host *host)
{
    if (host->connection >= 0)
        close(host->connection);
    host->connection = -1;
    host->have = 0;
    attest_cancel(&host->attest);
}

/* A whole frame. False if it breaks the protocol; one of a type from the future does not. */
static bool obey(struct host *host, uint8_t *payload, enum frame_type type, size_t size, struct orders *orders)
{
    switch (type) {
    case FRAME_ACK:
        orders->ack = true;
        return size == 0;
    case FRAME_STOP:
        if (size != 5 || payload[0] >= _NSIG)
            return false;
        orders->stop = true;
        orders->stop_signal = payload[0];
        orders->grace_ms = get_u32(payload + 1);
        return true;
    case FRAME_VALUE: /* a host that dials again gives them again; late ones change nothing */
        if (!host->waiting)
            return true;
        bool taken = launch_take(host->waiting, payload, size);
        explicit_bzero(payload, size);
        return taken;
    case FRAME_START:
        orders->start = true;
        return size == 0;
    case FRAME_ATTEST: /* an image that has not opted in knows no such frame */
        return !host->attests || attest_begin(&host->attest, payload, size);
    default:
        return true;
    }
}

static bool take(struct host *host, uint8_t byte, struct orders *orders)
{
    host->frame[host->have] = byte; /* there is room: a longer frame ends the connection below */
    if (++host->have < FRAME_HEADER)
        return true;
    size_t size = get_u32(host->frame + 1);
    if (size > MAX_PAYLOAD)
        return false;
    if (host->have < FRAME_HEADER + size)
        return true;
    host->have = 0;
    return obey(host, host->frame + FRAME_HEADER, host->frame[0], size, orders);
}

bool host_receive(struct host *host, struct orders *orders)
{
    uint8_t bytes[4096];
    ssize_t got = recv(host->connection, bytes, sizeof bytes, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return true;
    bool good = got > 0;
    for (ssize_t i = 0; good && i < got; i++)
        good = take(host, bytes[i], orders);
    return good;
}
