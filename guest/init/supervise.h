/* SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "config.h"
#include "host.h"
#include "output.h"

#define MAX_MESSAGE 255

/* Everything that init watches while the application runs, and until the host has its status. Times are of now_ms(). */
struct supervisor {
    struct host host;
    struct output output;
    int signals;       /* a signalfd */
    int logs[2];       /* the application's stdout and stderr, or -1 */
    bool gives_logs;   /* as the image's configuration says */
    bool started;      /* the host has given all its launch values */
    bool stopped;      /* before there was anything to stop */
    pid_t child;       /* the application's first process; 0 before it starts and after it ended */
    int stop_signal;   /* what the image wants to be stopped with */
    int64_t kill_at;   /* the end of a stop's grace */
    int64_t launch_at; /* the end of waiting for launch values */
    int64_t full_at;   /* since when the output has no room */
    uint64_t lost;     /* bytes of output dropped and not yet told */
    int64_t drain_at;  /* once the application ended: the end of waiting for its output */
    int64_t end_at;    /* and the end of everything */
    bool status_put;   /* the status is in the output */
    bool acknowledged; /* and the host has it */
    size_t status_size;
    uint8_t status[2 + MAX_MESSAGE]; /* payload of the frame: kind, value, message */
};

/* Block every signal; those that matter come by a file descriptor from now on. Nothing else is there yet. */
void supervise_begin(struct supervisor *supervisor);

/* Wait until the host has given the values that the image declares; if it does not, that is the end. */
void supervise_launch(struct supervisor *supervisor, const struct config *config);

/* The program runs: tell the host. */
void supervise_started(struct supervisor *supervisor);

/* Serve the host and the application until its end, and until the host has the status or its time is over. */
void supervise(struct supervisor *supervisor);

/* Give the host, if it dials in time, the message of a failure. */
void supervise_failure(struct supervisor *supervisor, const char *message);
