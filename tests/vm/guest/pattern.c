/* SPDX-License-Identifier: Apache-2.0 */
/* A pattern of one's own in much memory, and a look for another's in all of it (/proc/kcore: the kernel's own view).
 *
 * pattern scan OWN OTHER           prints how often each is there
 * pattern enclave PORT OWN OTHER   fills, tells the parent, waits for its word, and tells it the same
 *
 * A pattern is 16 equal bytes 16 times over, and is given by its byte, inverted: so it is nowhere but where it was put.
 */
#include <elf.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define FILLED (32UL << 20)
#define WORDS 32

static unsigned long buffer[1 << 17];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static unsigned long word_of(const char *inverted)
{
    return 0x0101010101010101UL * (unsigned char)~strtoul(inverted, NULL, 0);
}

static int is_there(const unsigned long *place, unsigned long word)
{
    for (int i = 0; i < WORDS; i++)
        if (place[i] != word)
            return 0;
    return 1;
}

static void scan(unsigned long own, unsigned long other, unsigned long *owns, unsigned long *others)
{
    Elf64_Ehdr header;
    Elf64_Phdr part;
    int fd = open("/proc/kcore", O_RDONLY);
    if (fd < 0 || pread(fd, &header, sizeof header, 0) != sizeof header)
        fail("/proc/kcore");
    *owns = *others = 0;
    for (int i = 0; i < header.e_phnum; i++) {
        if (pread(fd, &part, sizeof part, (off_t)(header.e_phoff + (unsigned)i * sizeof part)) != sizeof part)
            fail("/proc/kcore");
        if (part.p_type != PT_LOAD || part.p_paddr == (Elf64_Addr)-1)
            continue;
        for (unsigned long done = 0; done < part.p_filesz;) {
            size_t size = part.p_filesz - done < sizeof buffer ? part.p_filesz - done : sizeof buffer;
            ssize_t got = pread(fd, buffer, size, (off_t)(part.p_offset + done));
            if (got <= 0)
                fail("/proc/kcore: read");
            for (long at = 0; at + WORDS <= got / 8; at += WORDS) {
                *owns += (unsigned long)is_there(buffer + at, own);
                *others += (unsigned long)is_there(buffer + at, other);
            }
            done += (unsigned long)got;
        }
    }
    memset(buffer, 0, sizeof buffer);
    close(fd);
}

int main(int count, char **words)
{
    if (count < 4)
        return 2;
    unsigned long own = word_of(words[count - 2]), other = word_of(words[count - 1]), owns, others;
    if (!strcmp(words[1], "scan")) {
        scan(own, other, &owns, &others);
        printf("%lu %lu\n", owns, others);
        return 0;
    }
    unsigned long *memory = mmap(NULL, FILLED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    for (unsigned long i = 0; i < FILLED / 8; i++)
        memory[i] = own;
    struct sockaddr_vm parent = { .svm_family = AF_VSOCK, .svm_cid = 3, .svm_port = (unsigned)atoi(words[2]) };
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    char go;
    if (connect(fd, (struct sockaddr *)&parent, sizeof parent) || write(fd, "f", 1) != 1 || read(fd, &go, 1) != 1)
        fail("parent");
    scan(own, other, &owns, &others);
    dprintf(fd, "%lu %lu", owns, others);
    shutdown(fd, SHUT_WR);
    return read(fd, &go, 1) < 0;
}
