/* SPDX-License-Identifier: Apache-2.0 */
/* The sequence of an enclave's life, and the loop that serves it while the application runs. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "init.h"

#define LOG_PATIENCE_MS 5000        /* an application waits this long for a host that takes no output, then output is dropped */
#define DRAIN_SIZE 4096

uint64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void say(const char *message) { dprintf(STDERR_FILENO, "init: %s\n", message); }

static void describe(char *message, int error, const char *format, va_list arguments)
{
    int used = vsnprintf(message, FAIL_MESSAGE_SIZE, format, arguments);
    if (used < 0)
        used = 0;
    if (error && used < FAIL_MESSAGE_SIZE)
        snprintf(message + used, (size_t)(FAIL_MESSAGE_SIZE - used), ": %s", strerror(error));
}

void warn(int error, const char *format, ...)
{
    char message[FAIL_MESSAGE_SIZE];
    va_list arguments;
    va_start(arguments, format);
    describe(message, error, format, arguments);
    va_end(arguments);
    say(message);
}

static void __attribute__((noreturn)) power_off(void)
{
    /* reboot=k on the command line makes this a reset, which ends an enclave. */
    reboot(RB_AUTOBOOT);
    say("cannot end the machine");
    for (;;)
        pause();
}

void fail(int error, const char *format, ...)
{
    static bool failing;
    char message[FAIL_MESSAGE_SIZE];
    va_list arguments;
    va_start(arguments, format);
    describe(message, error, format, arguments);
    va_end(arguments);
    say(message);
    if (!failing && control_is_listening()) {
        failing = true;
        control_finish(STATUS_FAILED, 0, message);
    }
    power_off();
}

/* Reap every child that has ended; true when the application is among them. */
static bool reap(pid_t application, int *status)
{
    bool ended = false;
    for (;;) {
        int child_status;
        pid_t pid = waitpid(-1, &child_status, WNOHANG);
        if (pid <= 0)
            return ended;
        if (pid == application) {
            *status = child_status;
            ended = true;
        }
    }
}

/* Output of the application: from its pipe to the host, as far as there is room. */
struct log {
    int fd;
    bool is_stderr;
    uint64_t full_since;            /* ms, 0: there was room */
    uint64_t lost;                  /* bytes dropped since the host was told */
};

static bool log_dropping(const struct log *log)
{
    return log->full_since && now_ms() - log->full_since >= LOG_PATIENCE_MS;
}

static void log_read(struct log *log)
{
    uint8_t data[DRAIN_SIZE];
    size_t room = control_room();
    if (!room && !log_dropping(log)) {
        if (!log->full_since)
            log->full_since = now_ms();
        return;
    }
    size_t most = room && room < sizeof data ? room : sizeof data;
    ssize_t got = read(log->fd, data, most);
    if (got <= 0) {
        if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
            close(log->fd);
            log->fd = -1;
        }
        return;
    }
    if (!room) {
        log->lost += (uint64_t)got;
        return;
    }
    log->full_since = 0;
    if (log->lost) {
        control_lost(log->lost);
        log->lost = 0;
    }
    control_output(log->is_stderr, data, (size_t)got);
}

static void serve(const struct config *config, const struct application *application, int signals, struct log *logs)
{
    uint64_t kill_at = 0;           /* ms, 0: no stop was asked for */
    int status = 0;

    for (;;) {
        bool waiting = false;
        struct pollfd polled[5] = {
            { .fd = signals, .events = POLLIN },
            { .fd = control_listener(), .events = POLLIN },
            { .fd = control_connection(), .events = POLLIN | (control_wants_write() ? POLLOUT : 0) },
        };
        for (int i = 0; i < 2; i++) {
            /* With no room, look again when the connection takes something, or when patience ends. */
            bool ready = logs[i].fd >= 0 && (control_room() > 0 || log_dropping(&logs[i]));
            polled[3 + i] = (struct pollfd){ .fd = ready ? logs[i].fd : -1, .events = POLLIN };
            if (logs[i].fd >= 0 && !ready) {
                if (!logs[i].full_since)
                    logs[i].full_since = now_ms();
                waiting = true;
            }
        }
        int timeout = waiting ? 500 : -1;
        if (kill_at) {
            uint64_t now = now_ms();
            int left = kill_at > now ? (int)(kill_at - now) : 0;
            if (timeout < 0 || left < timeout)
                timeout = left;
        }
        if (poll(polled, 5, timeout) < 0 && errno != EINTR)
            fail(errno, "cannot poll");

        if (kill_at && now_ms() >= kill_at) {
            kill(application->pid, SIGKILL);
            kill_at = 0;
        }
        if (polled[1].revents)
            control_accept();
        if (polled[2].revents & (POLLIN | POLLHUP | POLLERR)) {
            struct stop_request request;
            if (control_read(&request)) {
                kill(application->pid, request.signal ? request.signal : config->stop_signal);
                kill_at = now_ms() + request.grace_ms;
            }
        }
        if (polled[2].revents & POLLOUT)
            control_write();
        for (int i = 0; i < 2; i++)
            if (polled[3 + i].revents)
                log_read(&logs[i]);
        if (polled[0].revents) {
            struct signalfd_siginfo info;
            while (read(signals, &info, sizeof info) == sizeof info)
                if (info.ssi_signo != SIGCHLD)
                    kill(application->pid, config->stop_signal);
            if (reap(application->pid, &status))
                break;
        }
    }

    kill(-1, SIGKILL);
    while (waitpid(-1, NULL, WNOHANG) > 0)
        ;
    /* What the application wrote last is still in its pipes. */
    for (int i = 0; i < 2; i++)
        while (logs[i].fd >= 0 && control_room() > 0) {
            struct pollfd rest = { .fd = logs[i].fd, .events = POLLIN };
            if (poll(&rest, 1, 0) <= 0)
                break;
            log_read(&logs[i]);
        }
    if (WIFSIGNALED(status))
        control_finish(STATUS_SIGNALLED, WTERMSIG(status), "");
    else
        control_finish(STATUS_EXITED, WEXITSTATUS(status), "");
}

int main(void)
{
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    signal(SIGPIPE, SIG_IGN);

    open_console();
    load_modules();
    control_listen();
    heartbeat();

    struct config config;
    struct application application;
    read_config(&config);
    control_hello_logs(config.logs);
    enter_root();

    sigset_t wanted;
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGCHLD);
    sigaddset(&wanted, SIGTERM);
    sigaddset(&wanted, SIGINT);
    sigaddset(&wanted, SIGPWR);
    int signals = signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0)
        fail(errno, "cannot watch for signals");
    start_application(&config, &application);
    struct log logs[2] = {
        { .fd = application.out },
        { .fd = application.err, .is_stderr = true },
    };
    serve(&config, &application, signals, logs);
    power_off();
}
