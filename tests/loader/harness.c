/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loader as an ordinary program: the same source over memory that a sanitizer watches.
 *
 * Built with -fsanitize=fuzzer it takes any bytes for an image. Otherwise it reads cases from standard input,
 *
 *     u32 low_memory_end, u32 image_size, the image           (little-endian)
 *
 * and answers each on standard output with u32 entry, u32 size, and so many bytes: entry 0 and what the loader said when
 * it refused, else the zero page, and behind it the command line with its NUL and the ramdisks as Linux will see them.
 */
#define MACHINE_H
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sanitizer/asan_interface.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;

#define IMAGE_BASE 0x800000u
#define ROM_SIZE 0x10000u
#define SAID_SIZE 256

static u8 *ram;
static u8 rom[ROM_SIZE];
static u32 ram_size;
static char said[SAID_SIZE];
static u32 said_size;
static jmp_buf stopped;

static void outb(u16 port, u8 value)
{
    if (port == 0x3f8 && said_size < SAID_SIZE)
        said[said_size++] = (char)value;
}

static u8 inb(u16 port) { return port == 0x3fd ? 0x20 : 0xff; }

/* RAM ends where its allocation does, so what is outside is seen by the sanitizer. */
static u8 *memory(u32 address)
{
    return address >= 0xffff0000u ? rom + (address - 0xffff0000u) : ram + address;
}

static void copy(u8 *to, const u8 *from, u32 size)
{
    for (u32 i = 0; i < size; i++)
        to[i] = from[i];
}

static void clear(u8 *to, u32 size)
{
    for (u32 i = 0; i < size; i++)
        to[i] = 0;
}

static void stop(void) __attribute__((noreturn));
static void stop(void) { longjmp(stopped, 1); }

#include "../../guest/loader/loader.c"

static void put(u32 offset, u32 value) { memcpy(rom + offset, &value, 4); }

/* 1 when the loader would enter a kernel, whose entry is then given; 0 when it refused. */
static int load(const u8 *image, u32 size, u32 low_memory_end, u32 *entry)
{
    static const char suffix[] = " suffix";
    ram_size = low_memory_end;
    ram = malloc(ram_size);
    if (!ram || size > ram_size - IMAGE_BASE)
        abort();
    memset(ram + RESTART_MARKER, 0, 4);
    memcpy(ram + IMAGE_BASE, image, size);
    memset(rom, 0, sizeof rom);
    put(0x00, BOOT_MAGIC);
    put(0x04, 2);
    put(0x0c, IMAGE_BASE);
    put(0x10, size);
    put(0x14, low_memory_end);
    put(0x1c, 0x1000);
    put(0x20, sizeof suffix - 1);
    put(BOOT_E820_COUNT, 3);
    memcpy(rom + 0x1000, suffix, sizeof suffix - 1);
    said_size = 0;
    if (setjmp(stopped))
        return 0;
    /* While the image is only looked at, nothing behind it may be. */
    struct image found;
    const struct boot_description *boot = (const struct boot_description *)rom;
    ASAN_POISON_MEMORY_REGION(ram + IMAGE_BASE + size, ram_size - IMAGE_BASE - size);
    find_sections(boot, &found);
    check_kernel(&found, memory(found.kernel.start));
    ASAN_UNPOISON_MEMORY_REGION(ram + IMAGE_BASE + size, ram_size - IMAGE_BASE - size);
    u64 made = loader_main();
    *entry = (u32)(made >> 32);
    if ((u32)made != ZERO_PAGE || *entry < IMAGE_BASE + size || *entry >= low_memory_end)
        abort();
    return 1;
}

static void unload(void)
{
    ASAN_UNPOISON_MEMORY_REGION(ram, ram_size);
    free(ram);
    ram = NULL;
}

#ifdef FUZZ
int LLVMFuzzerTestOneInput(const u8 *data, size_t size)
{
    u32 entry, room = IMAGE_BASE + (1u << 20);
    if (size <= 1u << 19) {
        load(data, (u32)size, room, &entry);
        unload();
    }
    return 0;
}
#else
static void answer(u32 entry, const void *first, u32 first_size, const void *second, u32 second_size, const void *third,
                   u32 third_size)
{
    u32 head[2] = { entry, first_size + second_size + third_size };
    fwrite(head, 1, sizeof head, stdout);
    fwrite(first, 1, first_size, stdout);
    fwrite(second, 1, second_size, stdout);
    fwrite(third, 1, third_size, stdout);
    fflush(stdout);
}

int main(void)
{
    u32 head[2];
    while (fread(head, 1, sizeof head, stdin) == sizeof head) {
        u8 *image = malloc(head[1] ? head[1] : 1);
        u32 entry = 0;
        if (!image || fread(image, 1, head[1], stdin) != head[1])
            return 2;
        if (load(image, head[1], head[0], &entry)) {
            const u8 *page = ram + ZERO_PAGE;
            const char *cmdline = (const char *)ram + CMDLINE;
            answer(entry, page, 4096, cmdline, (u32)strlen(cmdline) + 1, ram + le32(page + RAMDISK_IMAGE),
                   le32(page + RAMDISK_SIZE));
        } else {
            ASAN_UNPOISON_MEMORY_REGION(ram, ram_size);
            answer(0, said, said_size, "", 0, "", 0);
        }
        unload();
        free(image);
    }
    return 0;
}
#endif
