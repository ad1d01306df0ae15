/* SPDX-License-Identifier: Apache-2.0 */
/* init: process 1 of an enclave, from the kernel's first user-space instruction to the reboot that ends the machine.
 *
 * The boot ramdisk (measured in PCR1) holds this program and kernel modules; the application ramdisk (PCR2) holds the
 * image's root and its configuration. docs/init.md describes both, and the protocol with the host.
 *
 *   mounts.c       console, file systems, the change of root
 *   modules.c      kernel modules
 *   vsock.c        the heartbeat, and the port on which the host dials in
 *   config.c       the image's configuration
 *   application.c  from there to execve
 *   attest.c       attestation documents for the host
 *   launch.c       values that the host gives at launch
 *   supervise.c    the loop of the application's life and end
 *   host.c         one control connection: greeting it, reading from it
 *   output.c       the bounded buffer of what goes to the host */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "application.h"
#include "config.h"
#include "init.h"
#include "launch.h"
#include "modules.h"
#include "mounts.h"
#include "supervise.h"
#include "vsock.h"

static struct supervisor supervisor;

int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void sleep_ms(int ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L}, NULL);
}

void say(const char *format, ...)
{
    va_list arguments;
    char message[MAX_MESSAGE + 1];
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    dprintf(STDERR_FILENO, "init: %s\n", message);
}

/* The machine ends by a reboot, which every host takes as the end of the enclave. */
static _Noreturn void end_machine(void)
{
    tcdrain(STDERR_FILENO); /* the serial port may still be sending the last line */
    reboot(RB_AUTOBOOT);
    say("cannot reboot: %s", strerror(errno));
    for (;;)
        pause();
}

void fail(int error, const char *format, ...)
{
    va_list arguments;
    char message[MAX_MESSAGE + 1];
    va_start(arguments, format);
    int length = vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    if (error && length >= 0 && (size_t)length < sizeof message) {
        char *words = message + length;
        snprintf(words, sizeof message - (size_t)length, ": %s", strerror(error));
        if (words[0] && words[1] && words[2] >= 'A' && words[2] <= 'Z')
            words[2] += 'a' - 'A';
    }
    say("%s", message);
    supervise_failure(&supervisor, message);
    end_machine();
}

int main(void)
{
    if (getpid() != 1) {
        dprintf(STDERR_FILENO, "init: not process 1: this program is for the inside of an enclave\n");
        return 1;
    }
    umask(0); /* modes below are meant as they are written */
    supervise_begin(&supervisor);
    mount_devices();
    open_console();
    load_modules();
    supervisor.host.listener = listen_for_host();
    send_heartbeat();

    struct config config;
    config_take(&config, "/config");
    supervisor.gives_logs = config.logs;
    supervisor.host.attests = config.attest;
    supervisor.stop_signal = config.stop_signal;
    enter_root();
    mount_system();
    set_sysctls();
    open_console();
    set_up_network();

    if (config.launch_count) {
        launch_prepare();
        supervise_launch(&supervisor, &config);
    }
    supervisor.child = start_application(&config, supervisor.logs);
    supervise_started(&supervisor);
    supervise(&supervisor);
    end_machine();
}
