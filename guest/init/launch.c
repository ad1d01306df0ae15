/* SPDX-License-Identifier: Apache-2.0 */
/* Values that the host gives at launch, for names that the image declares: files under /run/enclave. They are not
 * measured, and the program has to treat them as what anybody may have said: docs/init.md. */
#define _GNU_SOURCE
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "init.h"

#define DIRECTORY "/run/enclave"
#define OPTIONS "mode=0755,size=8m,nr_inodes=256" /* room for the most, and longest, that there can be */

void launch_prepare(void)
{
    /* What a failed mkdir means shows in the mount. */
    mkdir(DIRECTORY, 0755);
    if (mount("tmpfs", DIRECTORY, "tmpfs", MS_NODEV | MS_NOSUID | MS_NOEXEC, OPTIONS) < 0)
        fail(errno, "cannot mount tmpfs on %s", DIRECTORY);
}

static const char *declared(const struct config *config, const uint8_t *name, size_t size)
{
    for (size_t i = 0; i < config->launch_count; i++)
        if (strlen(config->launch[i]) == size && !memcmp(config->launch[i], name, size))
            return config->launch[i];
    return NULL;
}

bool launch_take(const struct config *config, const uint8_t *payload, size_t size)
{
    if (size < 1 || size < 1 + (size_t)payload[0])
        return false;
    const char *name = declared(config, payload + 1, payload[0]);
    if (!name)
        return false;
    const uint8_t *value = payload + 1 + payload[0];
    ssize_t length = (ssize_t)(size - 1 - payload[0]);
    char path[128];
    snprintf(path, sizeof path, DIRECTORY "/%s", name);
    unlink(path);
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0400);
    if (fd < 0 || fchown(fd, config->uid, config->gid) < 0 || write(fd, value, (size_t)length) != length)
        fail(errno, "cannot write %s", path);
    close(fd);
    return true;
}
