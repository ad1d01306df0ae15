/* SPDX-License-Identifier: Apache-2.0 */
/* nsm HEX: one raw request to /dev/nsm, the response in hexadecimal on stdout. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

struct raw {
    uint64_t request, request_size, response, response_size;
};

int main(int count, char **words)
{
    static uint8_t request[8192], response[0x3000];
    size_t size = 0;
    if (count != 2)
        return 2;
    for (const char *at = words[1]; at[0] && at[1] && size < sizeof request; at += 2, size++)
        sscanf(at, "%2hhx", &request[size]);
    int fd = open("/dev/nsm", O_RDWR);
    if (fd < 0) {
        perror("/dev/nsm");
        return 1;
    }
    struct raw raw = {(uintptr_t)request, size, (uintptr_t)response, sizeof response};
    if (ioctl(fd, _IOWR(0x0a, 0, struct raw), &raw) < 0) {
        perror("NSM_IOCTL_RAW");
        return 1;
    }
    for (size_t i = 0; i < raw.response_size; i++)
        printf("%02x", response[i]);
    printf("\n");
    return 0;
}
