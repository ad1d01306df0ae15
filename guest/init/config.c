/* SPDX-License-Identifier: Apache-2.0 */
/* The image's configuration: NUL-terminated `key=value` records. The format is in docs/init.md and never breaks. */
#define _GNU_SOURCE
#include "config.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "init.h"

#define MAX_SIZE (1 << 20)
#define MAX_ID (UINT32_MAX - 1) /* all ones means "no change" to the kernel */
#define MAX_LAUNCH_NAME 64
#define DEFAULT_PATH "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

enum key { VERSION, ARG, ENV, WORKDIR, UID, GID, GROUP, LOGS, STOPSIGNAL, LAUNCH, ATTEST, KEYS };

static const struct {
    const char *name;
    bool repeats;
} KEY[KEYS] = {
    [VERSION] = {"version", false},
    [ARG] = {"arg", true},
    [ENV] = {"env", true},
    [WORKDIR] = {"workdir", false},
    [UID] = {"uid", false},
    [GID] = {"gid", false},
    [GROUP] = {"group", true},
    [LOGS] = {"logs", false},
    [STOPSIGNAL] = {"stopsignal", false},
    [LAUNCH] = {"launch", true},
    [ATTEST] = {"attest", false},
};

/* Decimal, without sign, space or leading zero, at most `limit`. */
static bool number(const char *text, uint32_t limit, uint32_t *value)
{
    uint64_t sum = 0;
    if (!*text || (text[0] == '0' && text[1]))
        return false;
    for (; *text; text++) {
        if (*text < '0' || *text > '9')
            return false;
        sum = sum * 10 + (uint64_t)(*text - '0');
        if (sum > limit)
            return false;
    }
    *value = (uint32_t)sum;
    return true;
}

/* A file name of letters, digits, '_', '-' and '.', that begins with a letter or '_'. */
static bool launch_name(const char *text)
{
    size_t length = strlen(text);
    if (length == 0 || length > MAX_LAUNCH_NAME)
        return false;
    for (size_t i = 0; i < length; i++) {
        char c = text[i];
        bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
        if (!letter && (i == 0 || !((c >= '0' && c <= '9') || c == '-' || c == '.')))
            return false;
    }
    return true;
}

static bool named_before(char **names, size_t count, const char *name)
{
    for (size_t i = 0; i < count; i++)
        if (!strcmp(names[i], name))
            return true;
    return false;
}

static enum key key_of(const char *record, const char *equals)
{
    size_t length = (size_t)(equals - record);
    enum key key = 0;
    while (key < KEYS && (strlen(KEY[key].name) != length || memcmp(KEY[key].name, record, length) != 0))
        key++;
    return key;
}

static size_t count_records(const char *bytes, size_t size)
{
    size_t count = 0;
    for (size_t i = 0; i < size; i++)
        count += bytes[i] == 0;
    return count;
}

/* Take one value. Returns NULL, or what is wrong with it. `before` is how many values of this key came before. */
static const char *take(struct config *config, enum key key, char *value, size_t before)
{
    uint32_t parsed = 0;
    switch (key) {
    case VERSION:
        return strcmp(value, "1") ? "version is not 1" : NULL;
    case ARG:
        config->args[before] = value;
        return before || *value ? NULL : "the first arg, the program, is empty";
    case ENV: {
        const char *equals = strchr(value, '=');
        config->env[before] = value;
        return equals && equals != value ? NULL : "env is not NAME=VALUE";
    }
    case WORKDIR:
        config->workdir = value;
        return *value == '/' ? NULL : "workdir is not an absolute path";
    case UID:
        if (!number(value, MAX_ID, &parsed))
            return "uid is not a number";
        config->uid = parsed;
        return NULL;
    case GID:
        if (!number(value, MAX_ID, &parsed))
            return "gid is not a number";
        config->gid = parsed;
        return NULL;
    case GROUP:
        if (!number(value, MAX_ID, &parsed))
            return "group is not a number";
        config->groups[before] = parsed;
        return NULL;
    case LOGS:
        config->logs = true;
        return strcmp(value, "1") ? "logs is not 1" : NULL;
    case STOPSIGNAL:
        if (!number(value, _NSIG - 1, &parsed) || parsed == 0)
            return "stopsignal is not a signal's number";
        config->stop_signal = (int)parsed;
        return NULL;
    case LAUNCH:
        config->launch[before] = value;
        if (before >= MAX_LAUNCH_VALUES)
            return "too many launch values";
        if (named_before(config->launch, before, value))
            return "launch names one value twice";
        return launch_name(value) ? NULL : "launch is not a name";
    case ATTEST:
        config->attest = true;
        return strcmp(value, "1") ? "attest is not 1" : NULL;
    case KEYS:
        break;
    }
    return "unknown key";
}

static const char *parse_record(struct config *config, char *record, bool first, size_t seen[KEYS])
{
    char *equals = strchr(record, '=');
    enum key key = equals ? key_of(record, equals) : KEYS;
    if (key == KEYS)
        return "unknown key";
    if (first != (key == VERSION))
        return "version must be the first record and no other";
    size_t before = seen[key]++;
    if (before && !KEY[key].repeats)
        return "key given twice";
    return take(config, key, equals + 1, before);
}

static bool has_path(const struct config *config)
{
    for (char **variable = config->env; *variable; variable++)
        if (!strncmp(*variable, "PATH=", strlen("PATH=")))
            return true;
    return false;
}

const char *config_parse(struct config *config, char *bytes, size_t size, size_t *record)
{
    size_t seen[KEYS] = {0}, records = count_records(bytes, size);
    *record = records + 1;
    if (size == 0 || bytes[size - 1])
        return "does not end with a NUL";
    *config = (struct config){.workdir = "/", .stop_signal = SIGTERM};
    config->args = calloc(records + 1, sizeof *config->args);
    config->env = calloc(records + 2, sizeof *config->env); /* and a PATH */
    config->groups = calloc(records, sizeof *config->groups);
    config->launch = calloc(records + 1, sizeof *config->launch);
    if (!config->args || !config->env || !config->groups || !config->launch)
        return "no memory for so many records";

    char *next = bytes;
    for (*record = 1; *record <= records; ++*record, next += strlen(next) + 1) {
        const char *wrong = parse_record(config, next, *record == 1, seen);
        if (wrong)
            return wrong;
    }
    if (!seen[ARG])
        return "no arg: nothing to run";
    config->group_count = seen[GROUP];
    config->launch_count = seen[LAUNCH];
    if (!has_path(config))
        config->env[seen[ENV]] = DEFAULT_PATH;
    return NULL;
}

/* The whole file, in memory that is never freed. */
static char *read_file(const char *path, size_t *size)
{
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0 || fstat(fd, &status) < 0)
        fail(errno, "cannot open %s, the image's configuration", path);
    if (!S_ISREG(status.st_mode) || status.st_size > MAX_SIZE)
        fail(0, "%s: not a file of at most %d bytes", path, MAX_SIZE);
    *size = (size_t)status.st_size;
    char *bytes = malloc(*size + 1);
    if (!bytes || read(fd, bytes, *size) != status.st_size)
        fail(errno, "cannot read %s", path);
    close(fd);
    return bytes;
}

void config_take(struct config *config, const char *path)
{
    size_t size, record;
    char *bytes = read_file(path, &size);
    const char *wrong = config_parse(config, bytes, size, &record);
    if (wrong)
        fail(0, "%s: record %zu: %s", path, record, wrong);
    unlink(path);
}
