// SPDX-License-Identifier: Apache-2.0
// Steps against /dev/nitro_enclaves, one an argument; prints each one's errno, 0 for success.
//
//     cpu=N  info=FLAGS  mem=OFFSET:SIZE[:FLAGS]  at=ADDRESS:SIZE  start=FLAGS:CID  other=REQUEST  fault=REQUEST
//     child=STEP (in a child of fork)  create (another enclave, steps are for it from now on)  poll=MS  node=REQUEST
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/nitro_enclaves.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define HUGE (2UL << 20)
#define ROOM (4UL << 30)

static int device, enclave;
static uint64_t base;

static int create(void) {
    uint64_t slot;
    int fd = ioctl(device, NE_CREATE_VM, &slot);
    if (fd < 0)
        return errno;
    if (!(fcntl(fd, F_GETFD) & FD_CLOEXEC) || !slot)
        return 1;
    enclave = fd;
    return 0;
}

static int step(const char *text) {
    const char *value = strchr(text, '=');
    char *next = NULL;
    uint64_t first = value ? strtoull(value + 1, &next, 0) : 0;
    uint64_t second = next && *next == ':' ? strtoull(next + 1, &next, 0) : 0;
    uint64_t third = next && *next == ':' ? strtoull(next + 1, &next, 0) : 0;
    size_t length = value ? (size_t)(value - text) : strlen(text);
    int result;
#define IS(word) (length == strlen(word) && !strncmp(text, word, length))
    if (IS("create"))
        return create();
    if (IS("cpu")) {
        uint32_t cpu = (uint32_t)first;
        result = ioctl(enclave, NE_ADD_VCPU, &cpu);
        if (!result && first && cpu != first)
            return 1;
    } else if (IS("info")) {
        struct ne_image_load_info info = {.flags = first};
        result = ioctl(enclave, NE_GET_IMAGE_LOAD_INFO, &info);
        if (!result && info.memory_offset != 8UL << 20)
            return 1;
    } else if (IS("mem") || IS("at")) {
        uint64_t address = IS("mem") ? base + first : first;
        struct ne_user_memory_region region = {.flags = third, .memory_size = second, .userspace_addr = address};
        result = ioctl(enclave, NE_SET_USER_MEMORY_REGION, &region);
    } else if (IS("start")) {
        struct ne_enclave_start_info info = {.flags = first, .enclave_cid = second};
        result = ioctl(enclave, NE_START_ENCLAVE, &info);
        if (!result && info.enclave_cid < 4)
            return 1;
    } else if (IS("other")) {
        uint64_t argument = 0;
        result = ioctl(enclave, first, &argument);
    } else if (IS("node")) {
        uint64_t argument = 0;
        result = ioctl(device, first, &argument);
    } else if (IS("fault")) {
        result = ioctl(enclave, first, (void *)16);
    } else if (IS("poll")) {
        struct pollfd fd = {.fd = enclave, .events = POLLIN | POLLOUT};
        return poll(&fd, 1, (int)first) == 1 ? 1000 + fd.revents : 0;
    } else if (IS("child")) {
        int status;
        pid_t child = fork();
        if (!child)
            _exit(step(value + 1) & 0xff);
        waitpid(child, &status, 0);
        return WEXITSTATUS(status);
    } else {
        return 9999;
    }
    return result < 0 ? errno : result;
}

int main(int argc, char **argv) {
    void *room = mmap(NULL, ROOM + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return 1;
    base = ((uintptr_t)room + HUGE - 1) & ~(HUGE - 1);
    device = open("/dev/nitro_enclaves", O_RDONLY);
    if (device < 0)
        return 1;
    printf("%d", create());
    for (int index = 1; index < argc; index++)
        printf(" %d", step(argv[index]));
    printf("\n");
    return 0;
}
