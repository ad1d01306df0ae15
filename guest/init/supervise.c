/* SPDX-License-Identifier: Apache-2.0 */
/* The one loop of process 1: signals, the host, the application's output, and time.
 *
 * Nothing in it blocks but poll(). The application's output is carried to the host through a bounded buffer: when that
 * is full the application waits, as with any pipe, but after a while its output is dropped and counted instead. */
#define _GNU_SOURCE
#include "supervise.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "init.h"

#define FULL_MS 5000       /* how long the application waits for a host that does not read */
#define DRAIN_MS 1000      /* after its end: for its output to find room */
#define END_MS 2000        /* after its end: for the host to take the output and the status */
#define LAUNCH_MS 60000    /* for the host to dial and to give its launch values */
#define STOP_GRACE_MS 10000 /* for a stop that comes as a signal to init */

#define NEVER INT64_MAX

void supervise_begin(struct supervisor *supervisor)
{
    sigset_t all, told;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    sigemptyset(&told);
    sigaddset(&told, SIGCHLD);
    sigaddset(&told, SIGTERM);
    sigaddset(&told, SIGINT);
    sigaddset(&told, SIGPWR);
    supervisor->signals = signalfd(-1, &told, SFD_CLOEXEC | SFD_NONBLOCK);
    supervisor->host.listener = supervisor->host.connection = -1;
    supervisor->host.attest.pipe = -1;
    supervisor->logs[0] = supervisor->logs[1] = -1;
    supervisor->kill_at = supervisor->full_at = supervisor->drain_at = supervisor->end_at = NEVER;
    supervisor->launch_at = NEVER;
}

static void stop(struct supervisor *supervisor, int signal, uint32_t grace_ms)
{
    supervisor->stopped = true;
    if (!supervisor->child)
        return;
    kill(supervisor->child, signal ? signal : supervisor->stop_signal);
    supervisor->kill_at = now_ms() + grace_ms;
}

static void ended(struct supervisor *supervisor, enum status_kind kind, int value, int drain_ms)
{
    supervisor->child = 0;
    supervisor->kill_at = NEVER;
    supervisor->status[0] = (uint8_t)kind;
    supervisor->status[1] = (uint8_t)value;
    supervisor->status_size = 2;
    supervisor->drain_at = now_ms() + drain_ms;
    supervisor->end_at = now_ms() + END_MS;
}

static void reap(struct supervisor *supervisor)
{
    pid_t pid;
    int status;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (pid != supervisor->child)
            continue;
        if (WIFSIGNALED(status))
            ended(supervisor, STATUS_SIGNALLED, WTERMSIG(status), DRAIN_MS);
        else
            ended(supervisor, STATUS_EXITED, WEXITSTATUS(status), DRAIN_MS);
        kill(-1, SIGKILL);
    }
}

static void take_signals(struct supervisor *supervisor)
{
    struct signalfd_siginfo info;
    while (read(supervisor->signals, &info, sizeof info) == sizeof info) {
        if (info.ssi_signo == SIGCHLD)
            reap(supervisor);
        else
            stop(supervisor, 0, STOP_GRACE_MS);
    }
}

static void put_status(struct supervisor *supervisor)
{
    output_put(&supervisor->output, FRAME_STATUS, supervisor->status, supervisor->status_size);
    supervisor->status_put = true;
}

static void lose_host(struct supervisor *supervisor)
{
    host_close(&supervisor->host);
    output_rewind(&supervisor->output);
}

static void take_host(struct supervisor *supervisor)
{
    struct orders orders = {0};
    if (!host_receive(&supervisor->host, &orders))
        lose_host(supervisor);
    if (orders.stop)
        stop(supervisor, orders.stop_signal, orders.grace_ms);
    supervisor->started |= orders.start;
    if (orders.ack && supervisor->status_put && !output_pending(&supervisor->output))
        supervisor->acknowledged = true;
}

static void greet_host(struct supervisor *supervisor)
{
    if (!host_accept(&supervisor->host, supervisor->gives_logs))
        return;
    output_rewind(&supervisor->output);
    /* The host before this one may have had the status and never said so. */
    if (supervisor->status_put && !output_pending(&supervisor->output))
        put_status(supervisor);
}

static void tell_lost(struct supervisor *supervisor)
{
    if (!supervisor->lost)
        return;
    uint8_t count[8];
    put_u32(count, (uint32_t)(supervisor->lost >> 32));
    put_u32(count + 4, (uint32_t)supervisor->lost);
    output_put(&supervisor->output, FRAME_LOST, count, sizeof count);
    supervisor->lost = 0;
}

/* A document that the host has asked for, as soon as there is room. Not after the status, which is the last frame. */
static void put_document(struct supervisor *supervisor)
{
    struct attest *attest = &supervisor->host.attest;
    if (!attest->ready || supervisor->status_put || !output_document_room(&supervisor->output))
        return;
    output_put(&supervisor->output, FRAME_DOCUMENT, attest->answer, attest->size);
    attest_cancel(attest);
}

/* Whether the output has had no room for so long that the application must not wait any more. */
static bool out_of_patience(const struct supervisor *supervisor, int64_t now)
{
    return supervisor->full_at != NEVER && now - supervisor->full_at >= FULL_MS;
}

/* One of the application's pipes has something to read, or has ended. */
static void take_log(struct supervisor *supervisor, int index, int64_t now)
{
    int *pipe = &supervisor->logs[index];
    ssize_t got;
    if (output_log_room(&supervisor->output)) {
        tell_lost(supervisor);
        enum frame_type type = index == 0 ? FRAME_STDOUT : FRAME_STDERR;
        got = output_put_from(&supervisor->output, type, *pipe, output_log_room(&supervisor->output));
    } else if (out_of_patience(supervisor, now)) {
        char dropped[4096];
        got = read(*pipe, dropped, sizeof dropped);
        if (got > 0)
            supervisor->lost += (uint64_t)got;
    } else {
        return; /* the other pipe has taken the room */
    }
    if (got == 0) {
        close(*pipe);
        *pipe = -1;
    }
}

/* What is still in the pipes has had its time. */
static void drop_logs(struct supervisor *supervisor)
{
    for (int i = 0; i < 2; i++) {
        int waiting = 0;
        if (supervisor->logs[i] < 0)
            continue;
        if (ioctl(supervisor->logs[i], FIONREAD, &waiting) == 0)
            supervisor->lost += (uint64_t)waiting;
        close(supervisor->logs[i]);
        supervisor->logs[i] = -1;
    }
}

/* After the application's end: its status goes last, after its output. */
static void finish(struct supervisor *supervisor, int64_t now)
{
    bool open = supervisor->logs[0] >= 0 || supervisor->logs[1] >= 0;
    if (supervisor->end_at == NEVER || supervisor->status_put || (open && now < supervisor->drain_at))
        return;
    drop_logs(supervisor);
    tell_lost(supervisor);
    put_status(supervisor);
}

/* Whether to read the application's output now: into the buffer, or, when patience is over, into nothing. */
static bool wants_logs(struct supervisor *supervisor, int64_t now)
{
    if (output_log_room(&supervisor->output))
        supervisor->full_at = NEVER;
    else if (supervisor->full_at == NEVER)
        supervisor->full_at = now;
    return supervisor->full_at == NEVER || out_of_patience(supervisor, now);
}

/* Until the first thing that only time brings. */
static int wait_ms(const struct supervisor *supervisor, int64_t now, bool reading)
{
    int64_t next = supervisor->kill_at < supervisor->end_at ? supervisor->kill_at : supervisor->end_at;
    if (supervisor->launch_at < next)
        next = supervisor->launch_at;
    if (!supervisor->status_put && supervisor->drain_at < next)
        next = supervisor->drain_at;
    if (!reading && supervisor->full_at + FULL_MS < next)
        next = supervisor->full_at + FULL_MS;
    if (next == NEVER)
        return -1;
    int64_t left = next - now;
    return left < 0 ? 0 : left > INT_MAX ? INT_MAX : (int)left;
}

static void turn(struct supervisor *supervisor)
{
    struct host *host = &supervisor->host;
    int64_t now = now_ms();
    if (now >= supervisor->kill_at) {
        kill(supervisor->child, SIGKILL);
        supervisor->kill_at = NEVER;
    }
    put_document(supervisor);
    finish(supervisor, now);
    struct output *output = &supervisor->output;
    if (host->connection >= 0 && output_pending(output) && !output_send(output, host->connection))
        lose_host(supervisor);
    bool reading = wants_logs(supervisor, now);
    short host_events = POLLIN | (output_pending(output) ? POLLOUT : 0);
    struct pollfd watched[] = {
        {supervisor->signals, POLLIN, 0},
        {host->listener, POLLIN, 0},
        {host->connection, host_events, 0},
        {reading ? supervisor->logs[0] : -1, POLLIN, 0},
        {reading ? supervisor->logs[1] : -1, POLLIN, 0},
        {host->attest.pipe, POLLIN, 0},
    };
    if (poll(watched, sizeof watched / sizeof *watched, wait_ms(supervisor, now, reading)) <= 0)
        return;
    if (watched[3].revents)
        take_log(supervisor, 0, now);
    if (watched[4].revents)
        take_log(supervisor, 1, now);
    if (watched[5].revents)
        attest_receive(&host->attest);
    if (watched[2].revents & ~POLLOUT)
        take_host(supervisor);
    if (watched[1].revents)
        greet_host(supervisor);
    if (watched[0].revents)
        take_signals(supervisor);
}

void supervise_launch(struct supervisor *supervisor, const struct config *config)
{
    supervisor->host.waiting = config;
    supervisor->launch_at = now_ms() + LAUNCH_MS;
    while (!supervisor->started && !supervisor->stopped && now_ms() < supervisor->launch_at)
        turn(supervisor);
    bool late = !supervisor->started && !supervisor->stopped;
    supervisor->launch_at = NEVER;
    supervisor->host.waiting = NULL;
    if (supervisor->stopped)
        fail(0, "stopped before the program was started");
    if (late)
        fail(0, "the host gave no launch values within %d s", LAUNCH_MS / 1000);
}

void supervise_started(struct supervisor *supervisor)
{
    output_put(&supervisor->output, FRAME_STARTED, NULL, 0);
}

void supervise(struct supervisor *supervisor)
{
    while (!supervisor->acknowledged && now_ms() < supervisor->end_at)
        turn(supervisor);
}

void supervise_failure(struct supervisor *supervisor, const char *message)
{
    ended(supervisor, STATUS_FAILED, 0, 0);
    size_t size = strlen(message);
    supervisor->status_size += size < MAX_MESSAGE ? size : MAX_MESSAGE;
    memcpy(supervisor->status + 2, message, supervisor->status_size - 2);
    if (supervisor->host.listener >= 0)
        supervise(supervisor);
}
