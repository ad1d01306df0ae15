/* SPDX-License-Identifier: Apache-2.0 */
/* Addresses that the loader, the linker script and Python (enclavekit/platform/rom.py) agree on. */
#ifndef LOADER_H
#define LOADER_H

#define ROM_BASE 0xffff0000         /* 64 KiB, ends with the reset vector's 16 bytes */
#define LOADER_OFFSET 0x8000        /* the loader's code in the ROM */

/* Guest memory below 1 MiB that the loader uses. */
#define RESTART_MARKER 0x4f0        /* u32; page 0 is never handed out by Linux, so it outlives the kernel */
#define LOADER_STACK_TOP 0x9000     /* grows down to 0x8000 */
#define ZERO_PAGE 0x10000           /* struct boot_params, 4096 bytes */
#define CMDLINE 0x20000             /* measured command line, then the suffix, then NUL */
#define CMDLINE_LIMIT 0x10000       /* bytes that may be used there */

#endif
