/* SPDX-License-Identifier: Apache-2.0 */
/* The file systems, before and after the change of root, and the little that makes the machine feel at home.
 *
 * Both ramdisks are unpacked into the kernel's one rootfs, which can never be unmounted; so the image's root is moved
 * over it, and chroot makes it the root of this process and its children. */
#define _GNU_SOURCE
#include "mounts.h"

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "init.h"

struct file_system {
    const char *type;
    const char *target;
    const char *options;
    unsigned long flags;
    mode_t mode; /* of the directory, where the image has none */
    bool optional;
};

static const struct file_system DEVICES = {"devtmpfs", "/dev", NULL, MS_NOSUID | MS_NOEXEC, 0755, false};

/* /run and /tmp are not here: what the image holds there stays. */
static const struct file_system SYSTEM[] = {
    {"proc", "/proc", NULL, MS_NODEV | MS_NOSUID | MS_NOEXEC, 0555, false},
    {"sysfs", "/sys", NULL, MS_NODEV | MS_NOSUID | MS_NOEXEC, 0555, false},
    {"devpts", "/dev/pts", "ptmxmode=0666,mode=0620,gid=5", MS_NOSUID | MS_NOEXEC, 0755, false},
    {"tmpfs", "/dev/shm", "mode=1777", MS_NODEV | MS_NOSUID | MS_NOEXEC, 01777, false},
    {"cgroup2", "/sys/fs/cgroup", NULL, MS_NODEV | MS_NOSUID | MS_NOEXEC, 0755, true},
};

static const struct {
    const char *path;
    mode_t mode;
} DIRECTORIES[] = {{"/run", 0755}, {"/tmp", 01777}};

static const struct {
    const char *path;
    const char *target;
} LINKS[] = {
    {"/dev/fd", "/proc/self/fd"},
    {"/dev/stdin", "/proc/self/fd/0"},
    {"/dev/stdout", "/proc/self/fd/1"},
    {"/dev/stderr", "/proc/self/fd/2"},
};

static void mount_one(const struct file_system *fs)
{
    /* What a failed mkdir means shows in the mount. sysfs and cgroup2 have their directories made by the kernel. */
    mkdir(fs->target, fs->mode);
    if (mount(fs->type, fs->target, fs->type, fs->flags, fs->options) < 0 && errno != EBUSY && !fs->optional)
        fail(errno, "cannot mount %s on %s", fs->type, fs->target);
}

void mount_devices(void)
{
    mount_one(&DEVICES);
}

void open_console(void)
{
    int fd = open("/dev/console", O_RDWR | O_NOCTTY);
    if (fd < 0)
        fd = open("/dev/null", O_RDWR);
    if (fd < 0)
        fail(errno, "cannot open /dev/console and /dev/null");
    for (int standard = 0; standard <= 2; standard++)
        dup2(fd, standard);
    if (fd > 2)
        close(fd);
}

void enter_root(void)
{
    if (mount("/rootfs", "/rootfs", NULL, MS_BIND, NULL) < 0)
        fail(errno, "cannot bind /rootfs, the root of the image");
    if (chdir("/rootfs") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        fail(errno, "cannot make /rootfs the root");
}

void mount_system(void)
{
    mount_devices();
    for (size_t i = 0; i < sizeof LINKS / sizeof *LINKS; i++)
        if (symlink(LINKS[i].target, LINKS[i].path) < 0 && errno != EEXIST)
            fail(errno, "cannot make %s", LINKS[i].path);
    for (size_t i = 0; i < sizeof SYSTEM / sizeof *SYSTEM; i++)
        mount_one(&SYSTEM[i]);
    chmod("/dev/vsock", 0666); /* as udev's rules have it: any user may ask for the CID */
    for (size_t i = 0; i < sizeof DIRECTORIES / sizeof *DIRECTORIES; i++)
        if (mkdir(DIRECTORIES[i].path, DIRECTORIES[i].mode) < 0 && errno != EEXIST)
            fail(errno, "cannot make %s", DIRECTORIES[i].path);
}

/* What distributions set at boot, and container runtimes for their containers: images expect it. */
static const struct {
    const char *path;
    const char *value;
} SYSCTLS[] = {
    {"/proc/sys/fs/protected_fifos", "1"},
    {"/proc/sys/fs/protected_hardlinks", "1"},
    {"/proc/sys/fs/protected_regular", "2"},
    {"/proc/sys/fs/protected_symlinks", "1"},
    {"/proc/sys/kernel/kptr_restrict", "1"},
    {"/proc/sys/kernel/panic_on_oops", "1"}, /* a kernel that stumbled attests to nothing any more */
    {"/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"},
    {"/proc/sys/net/ipv4/ping_group_range", "0 2147483647"},
    {"/proc/sys/vm/max_map_count", "1048576"},
};

void set_sysctls(void)
{
    for (size_t i = 0; i < sizeof SYSCTLS / sizeof *SYSCTLS; i++) {
        int fd = open(SYSCTLS[i].path, O_WRONLY | O_CLOEXEC);
        if (fd < 0)
            continue; /* this kernel has no such thing */
        ssize_t ignored = write(fd, SYSCTLS[i].value, strlen(SYSCTLS[i].value));
        (void)ignored;
        close(fd);
    }
}

void set_up_network(void)
{
    /* Neither is worth an end: a kernel may have no network at all. */
    struct ifreq request = {.ifr_name = "lo"};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd >= 0) {
        if (ioctl(fd, SIOCGIFFLAGS, &request) == 0) {
            request.ifr_flags |= IFF_UP;
            ioctl(fd, SIOCSIFFLAGS, &request);
        }
        close(fd);
    }
    char name[65] = "";
    if (gethostname(name, sizeof name) < 0 || !*name || !strcmp(name, "(none)"))
        sethostname("enclave", strlen("enclave"));
}
