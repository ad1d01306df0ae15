// SPDX-License-Identifier: Apache-2.0
// Each thing that our kernel promises, used: `features CPUS MEMORY_MIB`. A line for each, "name: yes", "name: no: why"
// or "name: skipped: why"; exit status 42 when there is no "no", so that no other program's success is mistaken for it.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/if_tun.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { YES, NO, SKIPPED };

static char why[256];

#define FAIL(...)                                     \
    do {                                              \
        snprintf(why, sizeof(why), __VA_ARGS__);      \
        return NO;                                    \
    } while (0)
#define MUST(call)                                                 \
    do {                                                           \
        if ((call) < 0)                                            \
            FAIL("%s: %s", #call, strerror(errno));                \
    } while (0)

static int read_file(const char *path, char *out, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t count = read(fd, out, size - 1);
    close(fd);
    if (count < 0)
        return -1;
    out[count] = 0;
    return 0;
}

static int write_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t count = write(fd, text, strlen(text));
    int failed = errno;
    close(fd);
    errno = failed;
    return count < 0 ? -1 : 0;
}

// In a child, so that what it changes is gone with it: its exit status is the answer, its reason comes by a pipe.
static int in_child(int (*test)(void)) {
    int ends[2];
    MUST(pipe(ends));
    pid_t child = fork();
    MUST(child);
    if (!child) {
        int answer = test();
        write(ends[1], why, strlen(why));
        _exit(answer);
    }
    close(ends[1]);
    ssize_t count = read(ends[0], why, sizeof(why) - 1);
    why[count > 0 ? count : 0] = 0;
    close(ends[0]);
    int status;
    MUST(waitpid(child, &status, 0));
    if (!WIFEXITED(status))
        FAIL("ended by signal %d", WTERMSIG(status));
    return WEXITSTATUS(status);
}

static int wanted_cpus, wanted_mib;

static int cpus(void) {
    long found = sysconf(_SC_NPROCESSORS_ONLN);
    if (found != wanted_cpus)
        FAIL("%ld CPUs, expected %d", found, wanted_cpus);
    for (int cpu = 0; cpu < found; cpu++) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        MUST(sched_setaffinity(0, sizeof(set), &set));
        if (sched_getcpu() != cpu)
            FAIL("does not run on CPU %d", cpu);
    }
    return YES;
}

static int memory(void) {
    struct sysinfo info;
    MUST(sysinfo(&info));
    unsigned long mib = info.totalram / 1048576 * info.mem_unit;
    if (mib < (unsigned long)wanted_mib * 15 / 16)
        FAIL("%lu MiB, expected about %d", mib, wanted_mib);
    // Two thirds of it, a byte in each two MiB: past 3 GiB there is a hole that it must not fall into.
    size_t size = (size_t)wanted_mib * 2 / 3 << 20;
    volatile unsigned char *data =
        mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED)
        FAIL("mmap: %s", strerror(errno));
    for (size_t at = 0; at < size; at += 2 << 20)
        data[at] = at >> 21;
    for (size_t at = 0; at < size; at += 2 << 20)
        if (data[at] != (unsigned char)(at >> 21))
            FAIL("byte 0x%zx has changed", at);
    munmap((void *)data, size);
    return YES;
}

static int vsock_loopback(void) {
    int server = socket(AF_VSOCK, SOCK_STREAM, 0), client = socket(AF_VSOCK, SOCK_STREAM, 0);
    MUST(server);
    struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_port = 7777, .svm_cid = VMADDR_CID_ANY};
    MUST(bind(server, (struct sockaddr *)&at, sizeof(at)));
    MUST(listen(server, 1));
    at.svm_cid = VMADDR_CID_LOCAL;
    MUST(connect(client, (struct sockaddr *)&at, sizeof(at)));
    int accepted = accept(server, NULL, NULL);
    char byte = 0;
    MUST(write(client, "x", 1));
    MUST(read(accepted, &byte, 1));
    close(client), close(accepted), close(server);
    return byte == 'x' ? YES : NO;
}

// The parent's side is the test's: it answers each connection to port 7001 with what it got.
static int vsock_out(void) {
    int client = socket(AF_VSOCK, SOCK_STREAM, 0);
    struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_port = 7001, .svm_cid = 3};
    char answer[6] = "";
    MUST(connect(client, (struct sockaddr *)&at, sizeof(at)));
    MUST(write(client, "hello", 5));
    MUST(recv(client, answer, 5, MSG_WAITALL));
    close(client);
    return strcmp(answer, "hello") ? NO : YES;
}

// And it connects to 7002 until it is answered.
static int vsock_in(void) {
    int server = socket(AF_VSOCK, SOCK_STREAM, 0);
    struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_port = 7002, .svm_cid = VMADDR_CID_ANY}, peer;
    socklen_t size = sizeof(peer);
    MUST(bind(server, (struct sockaddr *)&at, sizeof(at)));
    MUST(listen(server, 1));
    int accepted = accept(server, (struct sockaddr *)&peer, &size);
    MUST(accepted);
    MUST(write(accepted, "world", 5));
    close(accepted), close(server);
    if (peer.svm_cid != 3)
        FAIL("from CID %u, expected 3", peer.svm_cid);
    return YES;
}

static int nsm(void) {
    if (access("/sys/bus/virtio/drivers/virtio_nsm", F_OK) && access("/sys/bus/virtio/drivers/nsm", F_OK))
        FAIL("no driver");
    if (access("/dev/nsm", F_OK)) {
        snprintf(why, sizeof(why), "the driver is there, this machine has no such device");
        return SKIPPED;
    }
    // DescribeNSM, as CBOR text, through the driver's one ioctl (linux: include/uapi/linux/nsm.h).
    unsigned char request[] = "\x6b" "DescribeNSM", response[4096];
    struct {
        struct { void *base; size_t size; } request, response;
    } raw = {{request, 12}, {response, sizeof(response)}};
    int fd = open("/dev/nsm", O_RDWR);
    MUST(fd);
    MUST(ioctl(fd, _IOWR(0x0A, 0, raw), &raw));
    close(fd);
    if (!memmem(response, raw.response.size, "module_id", 9))
        FAIL("an answer of %zu bytes without module_id", raw.response.size);
    return YES;
}

static int hwrng(void) {
    char name[64];
    if (read_file("/sys/class/misc/hw_random/rng_available", name, sizeof(name)))
        FAIL("no hw_random: %s", strerror(errno));
    if (access("/dev/nsm", F_OK)) {
        snprintf(why, sizeof(why), "its source would be the security module, which this machine has not");
        return SKIPPED;
    }
    char bytes[16];
    int fd = open("/dev/hwrng", O_RDONLY);
    MUST(fd);
    MUST(read(fd, bytes, sizeof(bytes)));
    close(fd);
    return strstr(name, "nsm") ? YES : NO;
}

static int cgroups(void) {
    mkdir("/tmp/cg", 0755);
    MUST(mount("cgroup2", "/tmp/cg", "cgroup2", 0, NULL));
    char found[256];
    MUST(read_file("/tmp/cg/cgroup.controllers", found, sizeof(found)));
    const char *wanted[] = {"cpu", "memory", "pids", "cpuset"};
    for (size_t i = 0; i < 4; i++)
        if (!strstr(found, wanted[i]))
            FAIL("no %s among %s", wanted[i], found);
    MUST(write_file("/tmp/cg/cgroup.subtree_control", "+pids +memory"));
    MUST(mkdir("/tmp/cg/a", 0755));
    MUST(write_file("/tmp/cg/a/pids.max", "1"));
    MUST(write_file("/tmp/cg/a/cgroup.procs", "0"));
    pid_t child = fork();
    if (!child)
        _exit(0);
    if (child > 0)
        FAIL("a second process, and one is allowed");
    return errno == EAGAIN ? YES : NO;
}

static int namespaces(void) {
    MUST(unshare(CLONE_NEWUSER));
    MUST(unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWCGROUP | CLONE_NEWTIME));
    MUST(sethostname("inside", 6));
    pid_t child = fork();
    MUST(child);
    if (!child)
        _exit(getpid() == 1 ? 0 : 1);
    int status;
    MUST(waitpid(child, &status, 0));
    return status ? NO : YES;
}

static int seccomp(void) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EDOM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, filter};
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
    long answer = syscall(SYS_getppid);
    if (answer != -1 || errno != EDOM)
        FAIL("the call was made");
    return YES;
}

static int bpf(void) {
    struct bpf_insn program[] = {{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 1}, {.code = BPF_JMP | BPF_EXIT}};
    union bpf_attr load = {
        .prog_type = BPF_PROG_TYPE_CGROUP_SKB,
        .insns = (unsigned long)program,
        .insn_cnt = 2,
        .license = (unsigned long)"GPL",
    };
    int fd = syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof(load));
    MUST(fd);
    close(fd);
    return YES;
}

static int landlock(void) {
    struct landlock_ruleset_attr rules = {.handled_access_fs = LANDLOCK_ACCESS_FS_READ_FILE};
    int fd = syscall(SYS_landlock_create_ruleset, &rules, sizeof(rules), 0);
    MUST(fd);
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST(syscall(SYS_landlock_restrict_self, fd, 0));
    if (open("/proc/version", O_RDONLY) >= 0)
        FAIL("a file was opened that may not be");
    return errno == EACCES ? YES : NO;
}

static int overlay(void) {
    const char *directories[] = {"/tmp/o", "/tmp/o/l", "/tmp/o/u", "/tmp/o/w", "/tmp/o/m"};
    for (size_t i = 0; i < 5; i++)
        mkdir(directories[i], 0755);
    MUST(mount("tmpfs", "/tmp/o", "tmpfs", 0, NULL));
    for (size_t i = 1; i < 5; i++)
        MUST(mkdir(directories[i], 0755));
    close(creat("/tmp/o/l/below", 0644));
    MUST(mount("overlay", "/tmp/o/m", "overlay", 0, "lowerdir=/tmp/o/l,upperdir=/tmp/o/u,workdir=/tmp/o/w"));
    MUST(access("/tmp/o/m/below", R_OK));
    int fd = creat("/tmp/o/m/above", 0644);
    MUST(fd);
    close(fd);
    MUST(access("/tmp/o/u/above", R_OK));
    return YES;
}

static int tun(void) {
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    int fd = open("/dev/net/tun", O_RDWR), control = socket(AF_INET, SOCK_DGRAM, 0);
    MUST(fd);
    MUST(ioctl(fd, TUNSETIFF, &request));
    struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
    *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x0a090001)};
    MUST(ioctl(control, SIOCSIFADDR, &request));
    address->sin_addr.s_addr = htonl(0xffffff00);
    MUST(ioctl(control, SIOCSIFNETMASK, &request));
    request.ifr_flags = IFF_UP;
    MUST(ioctl(control, SIOCSIFFLAGS, &request));
    struct sockaddr_in other = {.sin_family = AF_INET, .sin_port = htons(9), .sin_addr.s_addr = htonl(0x0a090002)};
    MUST(sendto(control, "through", 7, 0, (struct sockaddr *)&other, sizeof(other)));
    unsigned char packet[2048];
    for (int tries = 0; tries < 16; tries++) {  // IPv6 has something to say too
        ssize_t size = read(fd, packet, sizeof(packet));
        MUST(size);
        if (size == 35 && packet[0] == 0x45 && !memcmp(packet + 28, "through", 7))
            return YES;
    }
    FAIL("the packet did not come");
}

static int loopback(int family, const char *address) {
    int server = socket(family, SOCK_STREAM, 0), client = socket(family, SOCK_STREAM, 0);
    MUST(server);
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } at = {.any = {.sa_family = family}};
    MUST(inet_pton(family, address, family == AF_INET ? (void *)&at.v4.sin_addr : (void *)&at.v6.sin6_addr) - 1);
    socklen_t size = family == AF_INET ? sizeof(at.v4) : sizeof(at.v6);
    MUST(bind(server, &at.any, size));
    MUST(listen(server, 1));
    MUST(getsockname(server, &at.any, &size));
    MUST(connect(client, &at.any, size));
    int accepted = accept(server, NULL, NULL);
    char byte = 0;
    MUST(write(client, "x", 1));
    MUST(read(accepted, &byte, 1));
    return byte == 'x' ? YES : NO;
}

static int ipv4(void) { return loopback(AF_INET, "127.0.0.1"); }
static int ipv6(void) { return loopback(AF_INET6, "::1"); }

static int netfilter_is_out(void) {
    if (!access("/proc/sys/net/netfilter", F_OK) || !access("/proc/net/ip_tables_names", F_OK))
        FAIL("it is there");
    return YES;
}

static int sysv(void) {
    int queue = msgget(IPC_PRIVATE, 0600);
    MUST(queue);
    struct { long type; char text[4]; } message = {1, "abc"};
    MUST(msgsnd(queue, &message, 4, 0));
    MUST(msgrcv(queue, &message, 4, 1, 0));
    MUST(msgctl(queue, IPC_RMID, NULL));
    return YES;
}

static int memory_is_no_file(void) {
    if (open("/dev/mem", O_RDONLY) >= 0 || open("/proc/kcore", O_RDONLY) >= 0)
        FAIL("it is");
    return YES;
}

static int modules_are_out(void) {
    if (syscall(SYS_init_module, "", 0, "") == 0 || errno != ENOSYS)
        FAIL("init_module: %s", strerror(errno));
    return YES;
}

static int acpi_is_out(void) {
    if (!access("/sys/firmware/acpi", F_OK) || !access("/sys/bus/pci", F_OK))
        FAIL("ACPI or PCI is there");
    return YES;
}

static int random_is_ready(void) {
    unsigned char bytes[32];
    if (syscall(SYS_getrandom, bytes, sizeof(bytes), 1 /* GRND_NONBLOCK */) != sizeof(bytes))
        FAIL("getrandom would wait");
    return YES;
}

// What init sets: the kernel's own values are others.
static int sysctls(void) {
    char value[16];
    MUST(read_file("/proc/sys/kernel/panic_on_oops", value, sizeof(value)));
    if (*value != '1')
        FAIL("an oops is no panic");
    MUST(read_file("/proc/sys/fs/protected_symlinks", value, sizeof(value)));
    if (*value != '1')
        FAIL("links are not protected");
    MUST(setuid(1000));
    int server = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(80)};
    MUST(bind(server, (struct sockaddr *)&at, sizeof(at)));
    return YES;
}

static int kvm_clock(void) {
    char source[256];
    MUST(read_file("/sys/devices/system/clocksource/clocksource0/available_clocksource", source, sizeof(source)));
    if (strstr(source, "kvm-clock"))
        return YES;
    snprintf(why, sizeof(why), "no KVM here: %.*s", (int)strcspn(source, "\n"), source);
    return SKIPPED;
}

static int ptp(void) {
    char name[64];
    if (read_file("/sys/class/ptp/ptp0/clock_name", name, sizeof(name))) {
        snprintf(why, sizeof(why), "no KVM here");
        return SKIPPED;
    }
    return strstr(name, "KVM") ? YES : NO;
}

int main(int count, char **words) {
    static const struct {
        const char *name;
        int (*test)(void);
        int alone;
    } tests[] = {
        {"cpus", cpus, 1}, {"memory", memory, 1}, {"vsock-loopback", vsock_loopback, 0}, {"vsock-out", vsock_out, 0},
        {"vsock-in", vsock_in, 0}, {"nsm", nsm, 0}, {"hwrng", hwrng, 0}, {"random", random_is_ready, 0},
        {"cgroups", cgroups, 1}, {"namespaces", namespaces, 1}, {"seccomp", seccomp, 1}, {"bpf", bpf, 0},
        {"landlock", landlock, 1}, {"overlay", overlay, 1}, {"tun", tun, 0}, {"ipv4", ipv4, 0}, {"ipv6", ipv6, 0},
        {"sysv", sysv, 0}, {"no-netfilter", netfilter_is_out, 0}, {"no-memory-files", memory_is_no_file, 0},
        {"no-modules", modules_are_out, 0}, {"no-acpi", acpi_is_out, 0}, {"sysctls", sysctls, 1}, {"kvm-clock", kvm_clock, 0}, {"ptp", ptp, 0},
    };
    if (count != 3)
        return 2;
    wanted_cpus = atoi(words[1]);
    wanted_mib = atoi(words[2]);
    mkdir("/tmp", 0777);
    int failed = 0;
    for (size_t i = 0; i < sizeof(tests) / sizeof(*tests); i++) {
        why[0] = 0;
        alarm(60);
        int answer = tests[i].alone ? in_child(tests[i].test) : tests[i].test();
        alarm(0);
        printf("%s: %s%s%s\n", tests[i].name, answer == YES ? "yes" : answer == SKIPPED ? "skipped" : "no",
               why[0] ? ": " : "", why);
        fflush(stdout);
        failed |= answer == NO;
    }
    return failed ? 1 : 42;
}
