/* SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <sys/types.h>

#include "config.h"

/* Start the image's program. Its output goes to the console, or where the image opted in to logs, into two pipes whose
 * reading ends are put in `logs` (else -1). Returns once the program itself runs; an error ends the machine. */
pid_t start_application(const struct config *config, int logs[2]);
