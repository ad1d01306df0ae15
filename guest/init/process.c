/* SPDX-License-Identifier: Apache-2.0 */
/* The application: pipes for its output, its identity, its directory, and the program from the image's own PATH. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "init.h"

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

/* Why the child could not become the application; sent through a pipe that a good execve closes. */
struct trouble {
    int error;
    char what[64];
};

static const char *search_path(char **environment)
{
    for (; *environment; environment++)
        if (!strncmp(*environment, "PATH=", 5))
            return *environment + 5;
    return DEFAULT_PATH;
}

/* As execvpe(3), with the PATH that the application will have, and no shell for scripts without "#!". */
static void execute(char **arguments, char **environment)
{
    const char *name = arguments[0];
    if (strchr(name, '/')) {
        execve(name, arguments, environment);
        return;
    }
    int error = ENOENT;
    char candidate[PATH_MAX];
    for (const char *path = search_path(environment); path; path = strchr(path, ':') ? strchr(path, ':') + 1 : NULL) {
        size_t size = strcspn(path, ":");
        if (size + strlen(name) + 2 > sizeof candidate)
            continue;
        memcpy(candidate, size ? path : ".", size ? size : 1);
        size = size ? size : 1;
        candidate[size] = '/';
        strcpy(candidate + size + 1, name);
        execve(candidate, arguments, environment);
        if (errno != ENOENT && errno != ENOTDIR)
            error = errno;          /* a program that is there but cannot run says more than "not found" */
    }
    errno = error;
}

static void __attribute__((noreturn)) give_up(int channel, const char *what)
{
    struct trouble trouble = { .error = errno };
    strncpy(trouble.what, what, sizeof trouble.what - 1);
    if (write(channel, &trouble, sizeof trouble) < 0)
        _exit(126);
    _exit(127);
}

/* As a container's: a working directory that is not there is made. */
static void make_directories(const char *path)
{
    char part[PATH_MAX];
    if (strlen(path) >= sizeof part)
        return;
    for (size_t i = 1; path[i]; i++)
        if (path[i] == '/') {
            memcpy(part, path, i);
            part[i] = 0;
            mkdir(part, 0755);
        }
    mkdir(path, 0755);
}

static void __attribute__((noreturn)) become(const struct config *config, char **environment, int out, int err, int channel)
{
    sigset_t none;
    int null = open("/dev/null", O_RDWR);
    if (null >= 0) {
        dup2(null, STDIN_FILENO);
        if (null > 2)
            close(null);
    }
    if ((out >= 0 && dup2(out, STDOUT_FILENO) < 0) || (err >= 0 && dup2(err, STDERR_FILENO) < 0))
        give_up(channel, "set up output");
    setsid();
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);

    make_directories(config->workdir);
    if (setgroups(config->group_count, config->groups) || setgid(config->gid) || setuid(config->uid))
        give_up(channel, "take on the user");
    if (chdir(config->workdir))
        give_up(channel, "enter the working directory");
    execute(config->arguments, environment);
    give_up(channel, "run");
}

static char **with_path(char **environment)
{
    size_t count = 0;
    bool has_path = false;
    for (; environment[count]; count++)
        has_path |= !strncmp(environment[count], "PATH=", 5);
    if (has_path)
        return environment;
    char **more = calloc(count + 2, sizeof(char *));
    if (!more)
        fail(errno, "no memory for the environment");
    more[0] = "PATH=" DEFAULT_PATH;
    memcpy(more + 1, environment, count * sizeof(char *));
    return more;
}

void start_application(const struct config *config, struct application *application)
{
    int channel[2], out[2] = { -1, -1 }, err[2] = { -1, -1 };
    struct trouble trouble;

    if (pipe2(channel, O_CLOEXEC) || (config->logs && (pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC))))
        fail(errno, "cannot make pipes");
    char **environment = with_path(config->environment);
    application->pid = fork();
    if (application->pid < 0)
        fail(errno, "cannot fork");
    if (!application->pid)
        become(config, environment, out[1], err[1], channel[1]);

    close(channel[1]);
    if (config->logs) {
        close(out[1]);
        close(err[1]);
        fcntl(out[0], F_SETFL, O_NONBLOCK);
        fcntl(err[0], F_SETFL, O_NONBLOCK);
    }
    ssize_t got = read(channel[0], &trouble, sizeof trouble);
    if (got == sizeof trouble) {
        trouble.what[sizeof trouble.what - 1] = 0;
        const char *whom = !strcmp(trouble.what, "enter the working directory") ? config->workdir : config->arguments[0];
        fail(trouble.error, "cannot %s %.256s", trouble.what, whom);
    }
    close(channel[0]);
    application->out = out[0];
    application->err = err[0];
}
