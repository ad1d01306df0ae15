/* SPDX-License-Identifier: Apache-2.0 */
/* The two vsock ports that init knows: 9000, which it dials once, and 9001, on which it listens.
 *
 * The heartbeat is that of AWS's own init: 0xb7 to CID 3 port 9000, and the same byte back. The hypervisor's tools wait
 * for it, so an enclave without an answer is no enclave. */
#define _GNU_SOURCE
#include "vsock.h"

#include <errno.h>
#include <linux/vm_sockets.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "init.h"

#define HEARTBEAT_PORT 9000
#define CONTROL_PORT 9001
#define HEARTBEAT 0xb7
#define HEARTBEAT_TIMEOUT_S 60
#define DEVICE_TIMEOUT_MS 1000 /* from the loading of its module to the device's first use */
#define RETRY_MS 10

static struct sockaddr_vm address(unsigned int cid, unsigned int port)
{
    return (struct sockaddr_vm){.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
}

/* Errors of a device that is not there, or not there yet. */
static bool no_device(int error)
{
    return error == ENODEV || error == EAFNOSUPPORT || error == ENETUNREACH;
}

static int open_socket(int flags)
{
    int fd, tries = DEVICE_TIMEOUT_MS / RETRY_MS;
    while ((fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | flags, 0)) < 0 && no_device(errno) && tries-- > 0)
        sleep_ms(RETRY_MS);
    if (fd < 0)
        fail(errno, "no vsock");
    return fd;
}

int listen_for_host(void)
{
    struct sockaddr_vm any = address(VMADDR_CID_ANY, CONTROL_PORT);
    int fd = open_socket(SOCK_NONBLOCK);
    if (bind(fd, (struct sockaddr *)&any, sizeof any) < 0 || listen(fd, 4) < 0)
        fail(errno, "cannot listen on vsock port %d", CONTROL_PORT);
    return fd;
}

static int dial_parent(void)
{
    const struct sockaddr_vm parent = address(PARENT_CID, HEARTBEAT_PORT);
    const struct timeval timeout = {.tv_sec = HEARTBEAT_TIMEOUT_S};
    for (int tries = DEVICE_TIMEOUT_MS / RETRY_MS;; tries--) {
        int fd = open_socket(0);
        setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &timeout, sizeof timeout);
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
        if (connect(fd, (const struct sockaddr *)&parent, sizeof parent) == 0)
            return fd;
        if (!no_device(errno) || tries == 0)
            fail(errno, "no heartbeat: cannot connect to the parent, CID %d port %d", PARENT_CID, HEARTBEAT_PORT);
        close(fd);
        sleep_ms(RETRY_MS);
    }
}

void send_heartbeat(void)
{
    unsigned char beat = HEARTBEAT;
    int fd = dial_parent();
    if (send(fd, &beat, 1, MSG_NOSIGNAL) != 1)
        fail(errno, "no heartbeat: cannot send to the parent");
    ssize_t got = recv(fd, &beat, 1, 0);
    if (got < 0)
        fail(errno == EAGAIN ? ETIMEDOUT : errno, "no heartbeat: no answer from the parent");
    if (got == 0)
        fail(0, "no heartbeat: the parent closed the connection without an answer");
    if (beat != HEARTBEAT)
        fail(0, "no heartbeat: the parent answered 0x%02x, expected 0x%02x", beat, HEARTBEAT);
    close(fd);
}
