/* SPDX-License-Identifier: Apache-2.0 */
/* Console, kernel modules, mounts, and the switch from the boot ramdisk to the image's root. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "init.h"

#define MODULES "/modules"
#define ROOT "/rootfs"

static void mount_at(const char *type, const char *target, unsigned long flags, const char *options, bool needed)
{
    if (mkdir(target, 0755) && errno != EEXIST) {
        if (needed)
            fail(errno, "cannot make %s", target);
        return;
    }
    /* EBUSY: the kernel has mounted devtmpfs by itself. */
    if (mount(type, target, type, flags, options) && errno != EBUSY && needed)
        fail(errno, "cannot mount %s on %s", type, target);
}

void open_console(void)
{
    mount_at("devtmpfs", "/dev", MS_NOSUID | MS_NOEXEC, "mode=0755", true);
    int console = open("/dev/console", O_RDWR | O_NOCTTY);
    if (console < 0)
        console = open("/dev/null", O_RDWR);
    if (console < 0)
        fail(errno, "cannot open /dev/console");
    for (int fd = 0; fd < 3; fd++)
        dup2(console, fd);
    if (console > 2)
        close(console);
}

static bool ends_with(const char *name, const char *end)
{
    size_t size = strlen(name), end_size = strlen(end);
    return size >= end_size && !strcmp(name + size - end_size, end);
}

/* Every file of /modules in the order of its name; each is removed, for its memory is the enclave's. */
void load_modules(void)
{
    struct dirent **names;
    int count = scandir(MODULES, &names, NULL, alphasort);
    if (count < 0)
        return;                     /* a kernel with everything built in */
    if (chdir(MODULES))
        fail(errno, "cannot enter " MODULES);
    for (int i = 0; i < count; i++) {
        const char *name = names[i]->d_name;
        if (ends_with(name, ".ko")) {
            int module = open(name, O_RDONLY | O_CLOEXEC);
            if (module < 0)
                fail(errno, "cannot open module %s", name);
            if (syscall(SYS_finit_module, module, "", 0) && errno != EEXIST) {
                if (errno == ENODEV)
                    warn(errno, "module %s", name);
                else
                    fail(errno, "cannot load module %s", name);
            }
            close(module);
            unlink(name);
        }
        free(names[i]);
    }
    free(names);
    if (chdir("/"))
        fail(errno, "cannot enter /");
}

static void link_at(const char *target, const char *path)
{
    if (symlink(target, path) && errno != EEXIST)
        warn(errno, "cannot make the link %s", path);
}

/* A directory that programs expect; what the image has there already stays as it is. */
static void directory_at(const char *path, mode_t mode)
{
    if (!mkdir(path, 0755))
        chmod(path, mode);
    else if (errno != EEXIST)
        warn(errno, "cannot make %s", path);
}

static void loopback_up(void)
{
    struct ifreq request = { .ifr_name = "lo" };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return;                     /* a kernel without networking */
    if (!ioctl(fd, SIOCGIFFLAGS, &request)) {
        request.ifr_flags = (short)(request.ifr_flags | IFF_UP | IFF_RUNNING);
        if (ioctl(fd, SIOCSIFFLAGS, &request))
            warn(errno, "cannot bring the loopback interface up");
    }
    close(fd);
}

/* The initramfs cannot be pivoted away from: /rootfs is mounted on itself and moved over /. */
void enter_root(void)
{
    if (mount(ROOT, ROOT, NULL, MS_BIND, NULL))
        fail(errno, "cannot mount " ROOT " on itself");
    if (chdir(ROOT) || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
        fail(errno, "cannot make " ROOT " the root");

    mount_at("devtmpfs", "/dev", MS_NOSUID | MS_NOEXEC, "mode=0755", true);
    mount_at("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, true);
    mount_at("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, true);
    mount_at("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666", false);
    mount_at("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777", false);
    mount_at("cgroup2", "/sys/fs/cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, false);
    link_at("/proc/self/fd", "/dev/fd");
    link_at("/proc/self/fd/0", "/dev/stdin");
    link_at("/proc/self/fd/1", "/dev/stdout");
    link_at("/proc/self/fd/2", "/dev/stderr");
    directory_at("/run", 0755);
    directory_at("/tmp", 01777);
    loopback_up();
    sethostname("enclave", 7);
}
