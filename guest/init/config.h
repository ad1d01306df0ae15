/* SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define MAX_LAUNCH_VALUES 64

/* What the image wants run, and how: docs/init.md. Strings point into the file's bytes. */
struct config {
    char **args; /* NULL-terminated, at least one */
    char **env;  /* NULL-terminated, with a PATH in it */
    const char *workdir;
    uid_t uid;
    gid_t gid;
    gid_t *groups;
    size_t group_count;
    bool logs; /* the application's output goes to the host */
    bool attest; /* the host may ask for attestation documents */
    int stop_signal;
    char **launch; /* NULL-terminated: names of the values that the host may give at launch */
    size_t launch_count;
};

/* Read the records in `bytes`. Returns NULL, or what is wrong with the record of number `*record`, counted from 1. */
const char *config_parse(struct config *config, char *bytes, size_t size, size_t *record);

/* Read and remove a configuration file; an error ends the machine. */
void config_take(struct config *config, const char *path);
