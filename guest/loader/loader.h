/* SPDX-License-Identifier: Apache-2.0 */
/* Numbers that the loader, the linker script and Python (enclavekit/platform/rom.py) agree on. */
#ifndef LOADER_H
#define LOADER_H

#define ROM_BASE 0xffff0000         /* 64 KiB, ends with the reset vector's 16 bytes */
#define LOADER_OFFSET 0x8000        /* the loader's code in the ROM */

/* Boot description: the ROM's first bytes. Offsets that assembly needs; struct boot_description has them all. */
#define BOOT_MAGIC 0x44424b45       /* "EKBD" */
#define BOOT_PROTOCOL 0x08
#define BOOT_E820_COUNT 0x2c
#define BOOT_E820 0x30

/* Boot protocols. */
#define PROTOCOL_EIF 0              /* the loader finds the image and does all */
#define PROTOCOL_LINUX 1            /* laid down by the host: 32-bit entry, zero page in ESI */
#define PROTOCOL_PVH 2              /* laid down by the host: 32-bit entry, hvm_start_info in EBX */
#define PROTOCOL_REALMODE 3         /* laid down by the host: the kernel's own 16-bit setup */

/* The loader's last word before the kernel's first instruction: for whoever measures. */
#define MARKER_PORT 0xe9
#define MARKER_LOADER_END 0x4b

#define COM1 0x3f8
#define COM1_LINE_STATUS 0x3fd
#define LSR_THR_EMPTY 0x20

/* Guest memory below 1 MiB that the loader uses. */
#define BDA_EBDA 0x40e              /* u16: segment of the extended BIOS data area */
#define BDA_BASE_MEMORY 0x413       /* u16: KiB below it */
#define RESTART_MARKER 0x4f0        /* u32; page 0 is never handed out by Linux, so it outlives the kernel */
#define LOADER_STACK_TOP 0x9000     /* grows down to 0x8000 */
#define ZERO_PAGE 0x10000           /* struct boot_params, 4096 bytes */
#define CMDLINE 0x20000             /* measured command line, then the suffix, then NUL */
#define SETUP_SEGMENT 0x1000        /* realmode: the kernel's setup lies at ZERO_PAGE instead, its heap and stack above */
#define SETUP_STACK_TOP 0xe000      /* in that segment */
#define CMDLINE_LIMIT 0x10000       /* bytes that may be used there */

#endif
