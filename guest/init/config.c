/* SPDX-License-Identifier: Apache-2.0 */
/* /config: NUL-terminated key=value records (docs/init.md). It is measured; all the same it is read with care. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "init.h"

#define CONFIG "/config"
#define MAX_CONFIG_SIZE (1 << 20)
#define MAX_ID 4294967294UL

static void *take(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (!memory)
        fail(errno, "no memory for " CONFIG);
    return memory;
}

static char *read_file(size_t *size)
{
    struct stat found;
    int fd = open(CONFIG, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &found))
        fail(errno, "cannot read " CONFIG);
    if (found.st_size < 1 || found.st_size > MAX_CONFIG_SIZE)
        fail(0, CONFIG ": %lld bytes, expected 1 to %d", (long long)found.st_size, MAX_CONFIG_SIZE);
    *size = (size_t)found.st_size;
    char *data = take(*size, 1);
    size_t have = 0;
    while (have < *size) {
        ssize_t got = read(fd, data + have, *size - have);
        if (got <= 0)
            fail(errno, "cannot read " CONFIG);
        have += (size_t)got;
    }
    close(fd);
    unlink(CONFIG);
    if (data[*size - 1])
        fail(0, CONFIG ": expected a NUL after the last record");
    return data;
}

static unsigned long number(const char *key, const char *text, unsigned long least, unsigned long most)
{
    unsigned long value = 0;
    size_t digits = strspn(text, "0123456789");
    if (digits && digits <= 10 && !text[digits])
        value = strtoul(text, NULL, 10);
    if (!digits || digits > 10 || text[digits] || value < least || value > most)
        fail(0, CONFIG ": %s is \"%.32s\", expected a number from %lu to %lu", key, text, least, most);
    return value;
}

enum single { VERSION, WORKDIR, UID, GID, LOGS, STOPSIGNAL, SINGLES };
static const char *const single_names[SINGLES] = { "version", "workdir", "uid", "gid", "logs", "stopsignal" };

void read_config(struct config *config)
{
    size_t size, records = 0, arguments = 0, environment = 0;
    char *data = read_file(&size);
    const char *single[SINGLES] = { NULL };

    for (size_t i = 0; i < size; i++)
        records += !data[i];
    config->arguments = take(records + 1, sizeof(char *));
    config->environment = take(records + 1, sizeof(char *));
    config->groups = take(records + 1, sizeof(gid_t));
    config->group_count = 0;

    for (char *record = data; record < data + size; record += strlen(record) + 1) {
        char *value = strchr(record, '=');
        if (!value)
            fail(0, CONFIG ": record \"%.32s\", expected key=value", record);
        size_t key = (size_t)(value - record);
        char *next = record + strlen(record) + 1;
        *value++ = 0;
        if ((record == data) != !strcmp(record, "version"))
            fail(0, CONFIG ": record \"%.32s\", expected version first, and once", record);
        if (!strcmp(record, "arg"))
            config->arguments[arguments++] = value;
        else if (!strcmp(record, "env"))
            config->environment[environment++] = value;
        else if (!strcmp(record, "group"))
            config->groups[config->group_count++] = (gid_t)number("group", value, 0, MAX_ID);
        else {
            int i = 0;
            while (i < SINGLES && strcmp(record, single_names[i]))
                i++;
            if (i == SINGLES)
                fail(0, CONFIG ": unknown key \"%.32s\"", record);
            if (single[i])
                fail(0, CONFIG ": %s is given twice", record);
            single[i] = value;
        }
        record[key] = '=';          /* for strlen() above */
        if (record + strlen(record) + 1 != next)
            fail(0, CONFIG ": broken record");
    }

    if (strcmp(single[VERSION], "1"))
        fail(0, CONFIG ": version is \"%.32s\", expected 1", single[VERSION]);
    if (!arguments)
        fail(0, CONFIG ": no arg");
    config->workdir = single[WORKDIR] ? (char *)single[WORKDIR] : "/";
    if (config->workdir[0] != '/')
        fail(0, CONFIG ": workdir is \"%.128s\", expected an absolute path", config->workdir);
    config->uid = single[UID] ? (uid_t)number("uid", single[UID], 0, MAX_ID) : 0;
    config->gid = single[GID] ? (gid_t)number("gid", single[GID], 0, MAX_ID) : 0;
    config->logs = single[LOGS] && number("logs", single[LOGS], 1, 1);
    config->stop_signal = single[STOPSIGNAL] ? (int)number("stopsignal", single[STOPSIGNAL], 1, 64) : 15;
}
