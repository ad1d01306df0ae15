/* SPDX-License-Identifier: Apache-2.0 */
/* From init's process to the image's program: everything that a child does before execve, and how it says what failed:
 * over a pipe that a successful execve closes. */
#define _GNU_SOURCE
#include "application.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "init.h"

extern char **environ;

enum step { STDIN, WORKDIR_MADE, GROUPS, GROUP, USER, WORKDIR_ENTERED, INTERPRETER, RUN };

struct failure {
    enum step step;
    int error;
};

static _Noreturn void give_up(int report, enum step step)
{
    const struct failure failure = {step, errno};
    ssize_t ignored = write(report, &failure, sizeof failure);
    (void)ignored;
    _exit(127);
}

/* As mkdir -p does. Whether it worked shows when the directory is entered. */
static void make_directories(const char *path)
{
    char part[PATH_MAX];
    for (const char *slash = path; *slash && (size_t)(slash - path) < sizeof part; slash++) {
        if (slash[1] && slash[1] != '/')
            continue;
        size_t length = (size_t)(slash - path) + 1;
        if (length == sizeof part)
            return;
        memcpy(part, path, length);
        part[length] = 0;
        mkdir(part, 0755);
    }
}

static _Noreturn void become(const struct config *config, const int logs[2], int report)
{
    setsid();
    for (int number = 1; number < _NSIG; number++)
        signal(number, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);

    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (null < 0 || dup2(null, STDIN_FILENO) < 0)
        give_up(report, STDIN);
    for (int i = 0; i < 2; i++) {
        if (logs[i] >= 0)
            dup2(logs[i], STDOUT_FILENO + i);
        /* So that the program may open /dev/stdout and /dev/stderr, as many do. */
        if (config->uid)
            (void)!fchown(STDOUT_FILENO + i, config->uid, config->gid);
    }
    umask(022);
    make_directories(config->workdir);
    if (setgroups(config->group_count, config->groups) < 0)
        give_up(report, GROUPS);
    if (setgid(config->gid) < 0)
        give_up(report, GROUP);
    if (setuid(config->uid) < 0)
        give_up(report, USER);
    if (chdir(config->workdir) < 0)
        give_up(report, WORKDIR_ENTERED);

    environ = config->env; /* execvp looks in this PATH, the image's */
    execvp(config->args[0], config->args);
    if (errno == ENOENT && strchr(config->args[0], '/') && !access(config->args[0], F_OK))
        give_up(report, INTERPRETER);
    give_up(report, RUN);
}

static _Noreturn void explain(const struct config *config, const struct failure *failure)
{
    switch (failure->step) {
    case STDIN:
        fail(failure->error, "cannot open /dev/null");
    case GROUPS:
        fail(failure->error, "cannot set %zu supplementary groups", config->group_count);
    case GROUP:
        fail(failure->error, "cannot become group %u", config->gid);
    case USER:
        fail(failure->error, "cannot become user %u", config->uid);
    case WORKDIR_ENTERED:
        fail(failure->error, "cannot enter working directory %s", config->workdir);
    case INTERPRETER:
        fail(0, "cannot run %s: the interpreter or loader that it asks for is missing", config->args[0]);
    default:
        fail(failure->error, "cannot run %s", config->args[0]);
    }
}

static void open_pipe(int ends[2], const char *what)
{
    if (pipe2(ends, O_CLOEXEC) < 0)
        fail(errno, "cannot make a pipe for %s", what);
}

pid_t start_application(const struct config *config, int logs[2])
{
    int report[2], out[2] = {-1, -1}, error[2] = {-1, -1};
    open_pipe(report, "the start of the program");
    if (config->logs) {
        open_pipe(out, "stdout");
        open_pipe(error, "stderr");
    }
    pid_t child = fork();
    if (child < 0)
        fail(errno, "cannot fork");
    if (child == 0)
        become(config, (const int[]){out[1], error[1]}, report[1]);
    close(report[1]);
    if (config->logs) {
        close(out[1]);
        close(error[1]);
    }
    logs[0] = out[0];
    logs[1] = error[0];

    struct failure failure;
    if (read(report[0], &failure, sizeof failure) == sizeof failure)
        explain(config, &failure);
    close(report[0]);
    return child;
}
