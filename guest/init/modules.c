/* SPDX-License-Identifier: Apache-2.0 */
/* Kernel modules of the boot ramdisk: /modules/NN-name.ko, uncompressed, where NN gives the order of loading. */
#define _GNU_SOURCE
#include "modules.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "init.h"

#define DIRECTORY "/modules"
#define NSM_SUFFIX "-nsm.ko"

static int is_module(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

static bool is_nsm(const char *name)
{
    size_t length = strlen(name), suffix = strlen(NSM_SUFFIX);
    return length >= suffix && !strcmp(name + length - suffix, NSM_SUFFIX);
}

static void load(const char *name)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, DIRECTORY "/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        fail(errno, "cannot open module %s", name);
    if (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST) {
        /* A machine without an NSM can still run an application that never asks it. */
        if (errno != ENODEV || !is_nsm(name))
            fail(errno, "cannot load module %s", name);
        say("no NSM device: module %s not loaded", name);
    }
    close(fd);
    unlink(path);
}

void load_modules(void)
{
    struct dirent **entries;
    int count = scandir(DIRECTORY, &entries, is_module, alphasort);
    if (count < 0) {
        if (errno == ENOENT)
            return; /* everything is built into the kernel */
        fail(errno, "cannot read " DIRECTORY);
    }
    for (int i = 0; i < count; i++) {
        load(entries[i]->d_name);
        free(entries[i]);
    }
    free(entries);
    rmdir(DIRECTORY);
}
