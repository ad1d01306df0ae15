/* SPDX-License-Identifier: Apache-2.0 */
/* What all parts of init share: the end of everything, words on the console, time. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/* Says `init: <message>` on the console and, where it can, to the host; then ends the machine. `error` is an errno
 * whose words follow the message, or 0. */
_Noreturn void fail(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Says `init: <message>` on the console. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Milliseconds of CLOCK_MONOTONIC. */
int64_t now_ms(void);

void sleep_ms(int ms);
