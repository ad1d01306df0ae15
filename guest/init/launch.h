/* SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "config.h"

/* A place in memory for the values, in the image's own root. */
void launch_prepare(void);

/* One value, as a frame carries it: a file that only the program's user can read. False if it breaks the protocol, or
 * the image has not declared it. */
bool launch_take(const struct config *config, const uint8_t *payload, size_t size);
