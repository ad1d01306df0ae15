/* SPDX-License-Identifier: Apache-2.0 */
/* vsock from inside: dial PORT TEXT (says TEXT, half-closes, prints the answer); echo PORT (one connection);
 * blast PORT BYTES [BUFFER] (a pattern, then prints how many bytes came back in order; BUFFER: of the socket). */
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static unsigned char buffer[65536];

static int check(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

static int dial(unsigned int port, const char *buffer_size)
{
    struct sockaddr_vm parent = { .svm_family = AF_VSOCK, .svm_cid = 3, .svm_port = port };
    int fd = check(socket(AF_VSOCK, SOCK_STREAM, 0), "socket");
    if (buffer_size) {
        unsigned long long size = strtoull(buffer_size, NULL, 10);
        check(setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &size, sizeof size), "setsockopt");
    }
    check(connect(fd, (struct sockaddr *)&parent, sizeof parent), "connect");
    return fd;
}

int main(int count, char **words)
{
    if (count < 3)
        return 2;
    unsigned int port = (unsigned int)atoi(words[2]);
    ssize_t got;
    if (!strcmp(words[1], "dial")) {
        int fd = dial(port, NULL);
        check((int)write(fd, words[3], strlen(words[3])), "write");
        check(shutdown(fd, SHUT_WR), "shutdown");
        while ((got = read(fd, buffer, sizeof buffer)) > 0)
            fwrite(buffer, 1, (size_t)got, stdout);
        check((int)got, "read");
        return 0;
    }
    if (!strcmp(words[1], "echo")) {
        struct sockaddr_vm here = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port };
        int listener = check(socket(AF_VSOCK, SOCK_STREAM, 0), "socket");
        check(bind(listener, (struct sockaddr *)&here, sizeof here), "bind");
        check(listen(listener, 8), "listen");
        puts("listening");
        fflush(stdout);
        struct sockaddr_vm peer;
        socklen_t size = sizeof peer;
        int fd = check(accept(listener, (struct sockaddr *)&peer, &size), "accept");
        printf("peer %u\n", peer.svm_cid);
        while ((got = read(fd, buffer, sizeof buffer)) > 0)
            for (ssize_t done = 0; done < got;)
                done += check((int)write(fd, buffer + done, (size_t)(got - done)), "write");
        return 0;
    }
    if (!strcmp(words[1], "blast")) {
        unsigned long bytes = strtoul(words[3], NULL, 10);
        int fd = dial(port, count > 4 ? words[4] : NULL);
        for (unsigned long sent = 0; sent < bytes;) {
            unsigned long size = bytes - sent < sizeof buffer ? bytes - sent : sizeof buffer;
            for (unsigned long i = 0; i < size; i++)
                buffer[i] = (unsigned char)((sent + i) % 251);
            sent += (unsigned long)check((int)write(fd, buffer, size), "write");
        }
        check(shutdown(fd, SHUT_WR), "shutdown");
        unsigned long back = 0;
        while ((got = read(fd, buffer, sizeof buffer)) > 0)
            for (ssize_t i = 0; i < got; i++, back++)
                if (buffer[i] != (unsigned char)(back % 251)) {
                    printf("wrong byte at %lu\n", back);
                    return 1;
                }
        printf("%lu bytes came back\n", back);
        return 0;
    }
    return 2;
}
