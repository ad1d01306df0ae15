/* SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* devtmpfs on /dev. */
void mount_devices(void);

/* Standard input, output and error on /dev/console; on /dev/null where the kernel has no console. */
void open_console(void);

/* Make /rootfs the root. */
void enter_root(void);

/* In the image's own root: the file systems that a Linux program expects. */
void mount_system(void);

/* Limits and protections as distributions and container runtimes have them, where the kernel has them. */
void set_sysctls(void);

/* The loopback interface up, and a host name where there is none. */
void set_up_network(void);
