/* SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* Load every kernel module in /modules, in the byte order of their names, and free the memory that they took there. */
void load_modules(void);
