// SPDX-License-Identifier: Apache-2.0
// The basic flow of /dev/nitro_enclaves, to its public ABI: memory and CPUs are given away, an image boots in them.
//
//     cc -o basic_flow basic_flow.c && ./basic_flow app.eif 512 2             on an EC2 instance with enclave support
//     enclave simulate --carrier qemu -- ./basic_flow app.eif 512 2           anywhere
//
// Exits with 0 once the enclave has ended; with 1 and the failed step's errno, or NE_ERR number, on stderr.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/nitro_enclaves.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define MIB (1UL << 20)
#define HUGE (2 * MIB)
#define HEARTBEAT_PORT 9000
#define HEARTBEAT 0xb7
#define HEARTBEAT_TIMEOUT_MS 180000

static int failed(const char *step) {
    fprintf(stderr, "%s: %d\n", step, errno);
    return 1;
}

// Huge pages; where none are reserved, ordinary memory with their alignment, which only a simulator takes.
static uint8_t *map_memory(size_t size) {
    void *huge = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    if (huge != MAP_FAILED)
        return huge;
    uint8_t *plain = mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return plain == MAP_FAILED ? NULL : (uint8_t *)(((uintptr_t)plain + HUGE - 1) & ~(HUGE - 1));
}

static int load(const char *path, uint8_t *memory, size_t room) {
    int image = open(path, O_RDONLY | O_CLOEXEC);
    if (image < 0)
        return -1;
    size_t done = 0;
    ssize_t count;
    while ((count = read(image, memory + done, room - done)) > 0)
        done += (size_t)count;
    errno = count ? errno : ENOSPC;
    close(image);
    return count || done == room ? -1 : 0;
}

// The image's init dials the parent and wants its byte back. -1 where there is no vsock: a simulator answers itself.
static int listen_for_heartbeat(void) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = HEARTBEAT_PORT};
    int listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0)
        return -1;
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1))
        exit(failed("heartbeat's port"));
    return listener;
}

static int answer_heartbeat(int listener, int enclave) {
    struct pollfd either[] = {{.fd = listener, .events = POLLIN}, {.fd = enclave}};
    if (poll(either, 2, HEARTBEAT_TIMEOUT_MS) <= 0 || !(either[0].revents & POLLIN))
        return -1;
    int connection = accept(listener, NULL, NULL);
    uint8_t byte = 0;
    int good = connection >= 0 && read(connection, &byte, 1) == 1 && byte == HEARTBEAT && write(connection, &byte, 1) == 1;
    close(connection);
    close(listener);
    return good ? 0 : -1;
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s IMAGE.eif MEMORY_MIB CPUS [debug]\n", argv[0]);
        return 2;
    }
    size_t size = strtoul(argv[2], NULL, 10) * MIB;

    int device = open("/dev/nitro_enclaves", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return failed("open /dev/nitro_enclaves");
    uint64_t slot;
    int enclave = ioctl(device, NE_CREATE_VM, &slot);
    if (enclave < 0)
        return failed("NE_CREATE_VM");
    close(device);

    struct ne_image_load_info image = {.flags = NE_EIF_IMAGE};
    if (ioctl(enclave, NE_GET_IMAGE_LOAD_INFO, &image))
        return failed("NE_GET_IMAGE_LOAD_INFO");

    uint8_t *memory = map_memory(size);
    if (!memory || image.memory_offset >= size)
        return failed("memory");
    if (load(argv[1], memory + image.memory_offset, size - image.memory_offset))
        return failed(argv[1]);
    struct ne_user_memory_region region = {.memory_size = size, .userspace_addr = (uintptr_t)memory};
    if (ioctl(enclave, NE_SET_USER_MEMORY_REGION, &region))
        return failed("NE_SET_USER_MEMORY_REGION");

    for (long count = strtol(argv[3], NULL, 10); count > 0; count--) {
        uint32_t cpu = 0; // any
        if (ioctl(enclave, NE_ADD_VCPU, &cpu))
            return failed("NE_ADD_VCPU");
    }

    int listener = listen_for_heartbeat();
    struct ne_enclave_start_info start = {.flags = argc > 4 ? NE_ENCLAVE_DEBUG_MODE : NE_ENCLAVE_PRODUCTION_MODE};
    if (ioctl(enclave, NE_START_ENCLAVE, &start))
        return failed("NE_START_ENCLAVE");
    printf("slot %llx, CID %llu\n", (unsigned long long)slot, (unsigned long long)start.enclave_cid);
    fflush(stdout);
    if (listener >= 0 && answer_heartbeat(listener, enclave))
        return failed("heartbeat");

    struct pollfd end = {.fd = enclave};
    if (poll(&end, 1, -1) != 1 || end.revents != POLLHUP)
        return failed("poll");
    printf("ended\n");
    close(enclave);
    return 0;
}
