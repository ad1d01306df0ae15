// SPDX-License-Identifier: Apache-2.0
// Steps against /dev/nitro_enclaves, one an argument; prints each one's errno, 0 for success.
//
//     cpu=N  info=FLAGS  mem=OFFSET:SIZE[:FLAGS]  at=ADDRESS:SIZE  start=FLAGS:CID  other=REQUEST  fault=REQUEST
//     child=STEP (in a child of fork)  create (another enclave, steps are for it from now on)  poll=MS  node=REQUEST
//     any (a CPU that the driver chooses: 1000 and its number)  small=SIZE (ordinary memory)  hole=OFFSET:SIZE (unmap it)  bad (create, with nowhere to put the slot)  close
//
// With NE_STEPS_HUGE set, memory is of huge pages, and there is:
//     giant=OFFSET:SIZE (in a page of 1 GiB, always the same)  bind=NODE (take memory from there)
//     poke=COUNT (as root: anything, anywhere into the device's registers, while the driver is away)
//     order=DIGITS (pages that follow one another in physical memory, in this order)
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
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define HUGE (2UL << 20)
#define ROOM (4UL << 30)

#define GIANT (1UL << 30)
#define RUN 7
#define POOL 24
#define MPOL_BIND 2

static int device, enclave;
static uint64_t base;

static int donate(uint64_t address, uint64_t size, uint64_t flags) {
    struct ne_user_memory_region region = {.flags = flags, .memory_size = size, .userspace_addr = address};
    return ioctl(enclave, NE_SET_USER_MEMORY_REGION, &region);
}

static uint64_t physical(const void *address) {
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    if (fd < 0 || pread(fd, &entry, 8, (off_t)((uintptr_t)address / 4096 * 8)) != 8)
        return 0;
    close(fd);
    return (entry & ((1UL << 55) - 1)) * 4096;
}

// Huge pages of one file, of which RUN follow one another; digits say which of them comes where.
static int in_order(const char *digits) {
    int file = memfd_create("pages", MFD_HUGETLB);
    if (file < 0 || ftruncate(file, POOL * HUGE))
        return -1;
    char *pages = mmap(NULL, POOL * HUGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
    if (pages == MAP_FAILED)
        return -1;
    int place[RUN];
    for (int first = 0; first < POOL; first++) {
        int found = 0;
        for (int number = 0; number < RUN; number++)
            for (int index = 0; index < POOL; index++)
                if (physical(pages + index * HUGE) == physical(pages + first * HUGE) + number * HUGE)
                    place[number] = index, found++;
        if (found < RUN)
            continue;
        size_t count = strlen(digits);
        for (size_t index = 0; index < count; index++)
            if (mmap((void *)(base + index * HUGE), HUGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE,
                     file, place[digits[index] - '0'] * (off_t)HUGE) == MAP_FAILED)
                return -1;
        return donate(base, count * HUGE, 0);
    }
    errno = ERANGE;
    return -1;
}

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

#define NAME "0000:00:02.0"
#define PLACE "/sys/bus/pci/devices/" NAME

static int tell(const char *file, const char *text) {
    int fd = open(file, O_WRONLY);
    int result = fd < 0 || write(fd, text, strlen(text)) < 0 ? -1 : 0;
    close(fd);
    return result;
}

static int poke(uint64_t count) {
    // What a driver has is not mapped.
    if (tell("/sys/bus/pci/drivers/nitro_enclaves/unbind", NAME) || tell(PLACE "/enable", "1"))
        return -1;
    int file = open(PLACE "/resource3", O_RDWR);
    volatile char *registers = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file < 0 || registers == MAP_FAILED)
        return -1;
    uint64_t random = 1;
    while (count--) {
        random = random * 6364136223846793005UL + 1442695040888963407UL;
        // Mostly the registers and the first words of a request, with small values; often the device is switched on.
        uint32_t place = random >> 60 ? random >> 33 & 0x1f : random >> 33 & 0xfff;
        if (random >> 55 & 1)
            registers[0] = 1;
        uint64_t value = random >> 45 & 3 ? random >> 16 & 0xf : random;
        switch (random >> 50 & 7) {
        case 0: registers[place] = (char)value; break;
        case 1: *(volatile uint16_t *)(registers + (place & ~1U)) = (uint16_t)value; break;
        case 2: *(volatile uint64_t *)(registers + (place & ~7U)) = value; break;
        case 3: value = *(volatile uint64_t *)(registers + (place & ~7U)); break;
        case 4: value = (uint64_t)registers[place]; break;
        default: *(volatile uint32_t *)(registers + (place & ~3U)) = (uint32_t)value; break;
        }
    }
    munmap((void *)registers, 4096);
    close(file);
    return tell(PLACE "/enable", "0") ? -1 : tell("/sys/bus/pci/drivers/nitro_enclaves/bind", NAME);
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
    if (IS("any")) {
        uint32_t cpu = 0;
        result = ioctl(enclave, NE_ADD_VCPU, &cpu);
        if (!result)
            return 1000 + (int)cpu;
    } else if (IS("cpu")) {
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
        result = donate(address, second, third);
    } else if (IS("small")) {
        void *room = mmap(NULL, first + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        result = donate(((uintptr_t)room + HUGE - 1) & ~(HUGE - 1), first, 0);
    } else if (IS("hole")) {
        result = munmap((void *)(base + first), second);
    } else if (IS("giant")) {
        static char *page;
        if (!page)
            page = mmap(NULL, GIANT, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_HUGE_1GB | MAP_NORESERVE, -1, 0);
        result = donate((uintptr_t)page + first, second, 0);
    } else if (IS("bind")) {
        unsigned long nodes = 1UL << first;
        result = (int)syscall(SYS_mbind, base, ROOM, MPOL_BIND, &nodes, 64, 0);
    } else if (IS("poke")) {
        return poke(first) < 0 ? errno : 0;
    } else if (IS("order")) {
        result = in_order(value + 1);
    } else if (IS("bad")) {
        result = ioctl(device, NE_CREATE_VM, (void *)16);
    } else if (IS("close")) {
        result = close(enclave);
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
        int *answer = mmap(NULL, sizeof *answer, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        pid_t child = fork();
        if (!child) {
            *answer = step(value + 1);
            _exit(0);
        }
        waitpid(child, NULL, 0);
        return *answer;
    } else {
        return 9999;
    }
    return result < 0 ? errno : result;
}

int main(int argc, char **argv) {
    int huge = getenv("NE_STEPS_HUGE") ? MAP_HUGETLB | MAP_HUGE_2MB : 0;
    void *room = mmap(NULL, ROOM + HUGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | huge, -1, 0);
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
