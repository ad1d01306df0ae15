/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The enclave's init: PID 1 of every image that enclavekit builds. docs/init.md is its contract.
 *
 *   main.c     the sequence, and the loop that lives until the application ends
 *   system.c   console, mounts, modules, switch to the image's root
 *   config.c   the image's configuration
 *   process.c  the application: from configuration to execve
 *   control.c  vsock: heartbeat, and the connection that the host makes to port 9001
 */
#ifndef INIT_H
#define INIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define FAIL_MESSAGE_SIZE 512

/* How the application ended (docs/init.md, STATUS). */
enum status_kind { STATUS_EXITED = 0, STATUS_SIGNALLED = 1, STATUS_FAILED = 2 };

/* Say on the console and, if it listens, to the host what could not be done, then end the enclave. "what: strerror(error)",
 * or only what when error is 0. */
void fail(int error, const char *format, ...) __attribute__((noreturn, format(printf, 2, 3)));
/* The same on the console only, and go on. */
void warn(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));
uint64_t now_ms(void);

/* system.c */
void open_console(void);
void load_modules(void);
void enter_root(void);

/* config.c */
struct config {
    char **arguments;               /* NULL-terminated, at least one */
    char **environment;             /* NULL-terminated */
    char *workdir;
    uid_t uid;
    gid_t gid;
    gid_t *groups;
    size_t group_count;
    bool logs;
    int stop_signal;
};
void read_config(struct config *config);

/* process.c */
struct application {
    pid_t pid;
    int out, err;                   /* its stdout and stderr, when the image gives them to the host; else -1 */
};
void start_application(const struct config *config, struct application *application);

/* control.c */
struct stop_request { int signal; uint32_t grace_ms; };

void control_listen(void);
void heartbeat(void);
bool control_is_listening(void);
void control_hello_logs(bool logs);
/* For poll(): the listening socket, and the connection or -1; wants_write tells whether output waits for it. */
int control_listener(void);
int control_connection(void);
bool control_wants_write(void);
void control_accept(void);
/* Read what the host said; true when it asks for a stop. */
bool control_read(struct stop_request *request);
void control_write(void);
/* How many bytes of output there is room for now. */
size_t control_room(void);
void control_output(bool is_stderr, const uint8_t *data, size_t size);
void control_lost(uint64_t bytes);
/* Give the status to the host: waits at most 2 s in all for it to come and take it. */
void control_finish(enum status_kind kind, int value, const char *message);

#endif
