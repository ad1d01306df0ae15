/* SPDX-License-Identifier: Apache-2.0 */
/* The guest of bench/vsock.py, as its only process: it loads the modules, dials the host (CID 2, which every vsock
 * device knows) and does what it is told there, a line at a time:
 *
 *   send SIZE CHUNK STREAMS   SIZE bytes by each of STREAMS connections, CHUNK at a time; then "sent CRC"
 *   take SIZE CHUNK STREAMS   as many are received; then "took CRC"
 *   ping COUNT                64 bytes are sent back COUNT times; then "done"
 *   dial COUNT                COUNT connections, one after the other; then "done"
 *   end */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define HOST 2
#define CONTROL 5000
#define DATA 5001
#define MAX_CHUNK (1 << 20)

static uint8_t chunk[MAX_CHUNK];
static uint32_t table[8][256];

static _Noreturn void end(const char *what)
{
    if (what)
        dprintf(2, "bench: %s: %s\n", what, strerror(errno));
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}

/* CRC-32 as zlib has it, eight bytes at a time. */
static void make_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++)
            value = value & 1 ? value >> 1 ^ 0xedb88320 : value >> 1;
        table[0][i] = value;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int slice = 1; slice < 8; slice++)
            table[slice][i] = table[slice - 1][i] >> 8 ^ table[0][table[slice - 1][i] & 0xff];
}

static uint32_t crc(uint32_t value, const uint8_t *data, size_t size)
{
    value = ~value;
    for (; size >= 8; data += 8, size -= 8) {
        uint32_t low, high;
        memcpy(&low, data, 4);
        memcpy(&high, data + 4, 4);
        low ^= value;
        value = table[7][low & 0xff] ^ table[6][low >> 8 & 0xff] ^ table[5][low >> 16 & 0xff] ^ table[4][low >> 24] ^
                table[3][high & 0xff] ^ table[2][high >> 8 & 0xff] ^ table[1][high >> 16 & 0xff] ^ table[0][high >> 24];
    }
    for (; size; data++, size--)
        value = table[0][(value ^ *data) & 0xff] ^ value >> 8;
    return ~value;
}

static void load_modules(void)
{
    struct dirent **entries;
    int count = scandir("/modules", &entries, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char path[512];
        snprintf(path, sizeof path, "/modules/%s", entries[i]->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0 && entries[i]->d_name[0] != '.')
            syscall(SYS_finit_module, fd, "", 0);
        close(fd);
    }
}

static int dial(unsigned port)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = HOST, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        end("dial");
    return fd;
}

static void stream(bool sends, uint64_t size, size_t step, bool hashes, uint32_t *hash)
{
    int fd = dial(DATA);
    uint64_t at = 0;
    while (at < size) {
        size_t want = size - at < step ? (size_t)(size - at) : step;
        if (sends) {
            if (hashes) {
                memcpy(chunk, &at, sizeof at); /* no two chunks are the same */
                *hash = crc(*hash, chunk, want);
            }
            for (size_t done = 0; done < want;) {
                ssize_t sent = send(fd, chunk + done, want - done, MSG_NOSIGNAL);
                if (sent <= 0)
                    end("send");
                done += (size_t)sent;
            }
            at += want;
        } else {
            ssize_t got = recv(fd, chunk, want, 0);
            if (got <= 0)
                end("receive");
            if (hashes)
                *hash = crc(*hash, chunk, (size_t)got);
            at += (uint64_t)got;
        }
    }
    if (!sends)
        (void)!send(fd, "x", 1, MSG_NOSIGNAL);
    char last;
    (void)!recv(fd, &last, 1, 0); /* the host has it all */
    close(fd);
}

static uint32_t streams(bool sends, uint64_t size, size_t step, int count, bool hashes)
{
    uint32_t hash = 0;
    if (step < 8 || step > MAX_CHUNK)
        end("chunk");
    for (int i = 1; i < count; i++)
        if (fork() == 0) {
            stream(sends, size, step, false, &hash);
            _exit(0);
        }
    stream(sends, size, step, hashes, &hash);
    while (wait(NULL) > 0)
        ;
    return hash;
}

static void ping(long count)
{
    int fd = dial(DATA);
    char data[64];
    while (count-- > 0)
        if (recv(fd, data, sizeof data, MSG_WAITALL) != sizeof data || send(fd, data, sizeof data, 0) != sizeof data)
            end("ping");
    close(fd);
}

int main(void)
{
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; fd < 3; fd++)
        dup2(console, fd);
    load_modules();
    make_table();
    for (size_t i = 0; i < sizeof chunk; i++)
        chunk[i] = (uint8_t)(i * 2654435761u >> 13);
    FILE *control = fdopen(dial(CONTROL), "r+");
    if (!control)
        end("control");
    setvbuf(control, NULL, _IONBF, 0);
    fprintf(control, "ready\n");
    char line[128];
    while (fgets(line, sizeof line, control)) {
        unsigned long long size;
        unsigned long step, number;
        int count, hashes;
        if (sscanf(line, "send %llu %lu %d %d", &size, &step, &count, &hashes) == 4)
            fprintf(control, "sent %u\n", streams(true, size, step, count, hashes));
        else if (sscanf(line, "take %llu %lu %d %d", &size, &step, &count, &hashes) == 4)
            fprintf(control, "took %u\n", streams(false, size, step, count, hashes));
        else if (sscanf(line, "ping %lu", &number) == 1)
            ping((long)number), fprintf(control, "done\n");
        else if (sscanf(line, "dial %lu", &number) == 1) {
            while (number-- > 0)
                close(dial(DATA));
            fprintf(control, "done\n");
        } else
            break;
    }
    end(NULL);
}
