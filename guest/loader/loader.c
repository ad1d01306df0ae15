/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The EIF loader at the reset vector: finds the image in enclave memory, checks it, boots it where it lies.
 *
 * Ramdisks stay in place. Linux takes one range as its initrd and skips zero bytes between archives, so the 12-byte
 * section headers between neighbouring ramdisks are zeroed; if anything else lies between them they are moved
 * together. The kernel's protected-mode part is copied past the image's end, because its decompressor needs
 * init_size bytes there. Everything the image says is hostile until checked; all sums of its numbers are 64 bits wide.
 *
 * Sources: the EIF layout in docs/eif.md; Linux Documentation/arch/x86/boot.rst and zero-page.rst.
 */
#include "loader.h"
#include "machine.h"

/* ---- boot description: written by Python at the ROM's first byte (enclavekit/platform/rom.py) ---- */

struct e820_entry {
    u64 address, size;
    u32 type;
} __attribute__((packed));

struct boot_description {
    u32 magic;                      /* BOOT_MAGIC */
    u32 version;                    /* 2 */
    u32 protocol;                   /* PROTOCOL_… */
    u32 image_base, image_size;     /* bytes; where the EIF lies */
    u32 low_memory_end;             /* RAM below 4 GiB ends here */
    u32 rsdp;                       /* ACPI root pointer, 0 for none */
    u32 suffix_offset, suffix_size; /* in the ROM: appended to the command line, not measured */
    u32 entry, argument;            /* what the host laid down: the kernel's first instruction, zero page or start info */
    u32 e820_count;                 /* at most 128 */
    struct e820_entry e820[];
} __attribute__((packed));

/* ---- EIF, big-endian ---- */

#define EIF_HEADER_SIZE 548
#define SECTION_HEADER_SIZE 12
#define MAX_SECTIONS 32
#define EIF_OFFSETS 0x1c            /* 32 × u64: of the section headers */
#define EIF_SIZES 0x11c             /* 32 × u64: of the sections' data */

enum { KERNEL = 1, CMDLINE_SECTION = 2, RAMDISK = 3, SIGNATURE = 4, METADATA = 5 };

struct span { u32 start, size; };   /* guest physical; checked to lie inside the image */

struct image {
    struct span kernel, cmdline, ramdisk[MAX_SECTIONS];
    u32 ramdisks;
};

/* ---- bzImage setup header and zero page: the same offsets in both ---- */

#define SETUP_SECTS 0x1f1           /* u8 */
#define BOOT_FLAG 0x1fe             /* u16, 0xaa55 */
#define JUMP_OFFSET 0x201           /* u8: the header ends at 0x202 + this */
#define HEADER_MAGIC 0x202          /* u32, "HdrS" */
#define PROTOCOL_VERSION 0x206      /* u16 */
#define TYPE_OF_LOADER 0x210        /* u8 */
#define LOADFLAGS 0x211             /* u8, bit 0: loaded high */
#define CODE32_START 0x214          /* u32 */
#define RAMDISK_IMAGE 0x218         /* u32 */
#define RAMDISK_SIZE 0x21c          /* u32 */
#define CMD_LINE_PTR 0x228          /* u32 */
#define INITRD_ADDR_MAX 0x22c       /* u32 */
#define KERNEL_ALIGNMENT 0x230      /* u32 */
#define RELOCATABLE 0x234           /* u8 */
#define XLOADFLAGS 0x236            /* u16, bit 0: 64-bit kernel, bit 1: ramdisk may lie anywhere below 4 GiB and above */
#define CMDLINE_SIZE 0x238          /* u32, without the NUL */
#define PREF_ADDRESS 0x258          /* u64 */
#define INIT_SIZE 0x260             /* u32 */
#define SETUP_HEADER_END 0x268

#define ZP_ACPI_RSDP 0x070          /* u64 */
#define ZP_E820_COUNT 0x1e8         /* u8 */
#define ZP_VID_MODE 0x1fa           /* u16 */
#define ZP_E820 0x2d0               /* 20 bytes each */

/* ---- numbers in memory, wherever they lie ---- */

static inline u16 le16(const u8 *p) { return (u16)(p[0] | p[1] << 8); }
static inline u32 le32(const u8 *p) { return le16(p) | (u32)le16(p + 2) << 16; }
static inline u64 le64(const u8 *p) { return le32(p) | (u64)le32(p + 4) << 32; }
static inline u16 be16(const u8 *p) { return (u16)(p[0] << 8 | p[1]); }
static inline u32 be32(const u8 *p) { return (u32)be16(p) << 16 | be16(p + 2); }
static inline u64 be64(const u8 *p) { return (u64)be32(p) << 32 | be32(p + 4); }

static inline void put32(u8 *p, u32 value)
{
    for (u32 i = 0; i < 4; i++)
        p[i] = (u8)(value >> 8 * i);
}

/* ---- words on the serial port ---- */

static void print(const char *text)
{
    for (; *text; text++) {
        for (u32 tries = 0; tries < 100000 && !(inb(COM1_LINE_STATUS) & LSR_THR_EMPTY); tries++)
            ;
        outb(COM1, (u8)*text);
    }
}

static void print_hex(u64 value)
{
    char text[19];
    for (int i = 0; i < 16; i++)
        text[2 + i] = "0123456789abcdef"[(value >> (60 - 4 * i)) & 15];
    int first = 2;                  /* short numbers as 8 digits */
    if (!(value >> 32))
        first = 10;
    text[first - 2] = '0';
    text[first - 1] = 'x';
    text[18] = 0;
    print(text + first - 2);
}

static void __attribute__((noreturn)) refuse(const char *what, u64 got, const char *expected)
{
    print("loader: ");
    print(what);
    print(": got ");
    print_hex(got);
    print(", expected ");
    print(expected);
    print("\r\n");
    stop();
}

/* ---- the image ---- */

#define MAX_CMDLINE_SECTION (1 << 16)
#define MAX_SIGNATURE (1 << 15)
#define MAX_METADATA (1 << 20)

static void at_most(const char *what, u64 size, u64 limit)
{
    if (size > limit)
        refuse(what, size, "less: nothing real is as large");
}

/* The rules are those of the strict reader, enclavekit/eif/reader.py; its order, too. */
static void find_sections(const struct boot_description *boot, struct image *image)
{
    const u8 *eif = memory(boot->image_base);
    u64 size = boot->image_size;

    if (size < EIF_HEADER_SIZE)
        refuse("image size", size, "at least the 548 bytes of a header");
    if (be32(eif) != 0x2e656966)
        refuse("image magic", be32(eif), "0x2e656966");
    u16 version = be16(eif + 4);
    if (version < 2 || version > 4)
        refuse("image version", version, "2, 3 or 4");
    if (be16(eif + 6) & 1)
        refuse("image flags", be16(eif + 6), "bit 0 clear, for x86_64");
    u32 count = be16(eif + 0x1a);
    if (count < 2 || count > MAX_SECTIONS)
        refuse("section count", count, "2 to 32");

    image->kernel.size = image->cmdline.size = image->ramdisks = 0;
    image->kernel.start = image->cmdline.start = 0;
    u32 signatures = 0, metadata = 0;
    u64 end = EIF_HEADER_SIZE;
    for (u32 i = 0; i < count; i++) {
        u64 offset = be64(eif + EIF_OFFSETS + 8 * i), length = be64(eif + EIF_SIZES + 8 * i);
        if (offset < EIF_HEADER_SIZE || offset > size || size - offset < SECTION_HEADER_SIZE)
            refuse("section offset", offset, "a place inside the image");
        if (length > size - offset - SECTION_HEADER_SIZE)
            refuse("section size", length, "no more than the image holds");
        if (offset < end)
            refuse("section offset", offset, "a place behind the section before");
        end = offset + SECTION_HEADER_SIZE + length;
        const u8 *header = eif + (u32)offset;
        if (be64(header + 4) != length)
            refuse("section header size", be64(header + 4), "the size in the table");
        if (be16(header + 2))
            refuse("section flags", be16(header + 2), "0");
        struct span data = { boot->image_base + (u32)offset + SECTION_HEADER_SIZE, (u32)length };
        switch (be16(header)) {
        case KERNEL:
            if (image->kernel.start)
                refuse("kernel sections", 2, "exactly one");
            image->kernel = data;
            break;
        case CMDLINE_SECTION:
            if (image->cmdline.start)
                refuse("cmdline sections", 2, "exactly one");
            at_most("cmdline size", length, MAX_CMDLINE_SECTION);
            image->cmdline = data;
            break;
        case RAMDISK:
            if (!image->kernel.start)
                refuse("ramdisk before the kernel at offset", offset, "the kernel first");
            image->ramdisk[image->ramdisks++] = data;
            break;
        case SIGNATURE:
            if (signatures++)
                refuse("signature sections", 2, "at most one");
            if (version < 3)
                refuse("signature in image version", version, "3 or later");
            at_most("signature size", length, MAX_SIGNATURE);
            break;
        case METADATA:
            if (metadata++)
                refuse("metadata sections", 2, "at most one");
            if (version < 4)
                refuse("metadata in image version", version, "4");
            at_most("metadata size", length, MAX_METADATA);
            break;
        default:
            refuse("section type", be16(header), "1 to 5");
        }
    }
    if (!image->kernel.start)
        refuse("kernel sections", 0, "exactly one");
    if (!image->cmdline.start)
        refuse("cmdline sections", 0, "exactly one");
    if (!image->ramdisks)
        refuse("ramdisk sections", 0, "at least one");
    if (version == 4 && !metadata)
        refuse("metadata sections", 0, "one, as version 4 must have");
}

/*
 * One range that Linux unpacks as the concatenation of all ramdisks. It begins on a page, or some kernels complain at
 * length; our builder sees to it, other images are moved down by less than a page.
 */
static struct span join_ramdisks(const struct image *image)
{
    struct span joined = image->ramdisk[0];
    u32 page = joined.start & ~0xfffu;
    if (page != joined.start)
        copy(memory(page), memory(joined.start), joined.size);
    joined.start = page;
    for (u32 i = 1; i < image->ramdisks; i++) {
        struct span next = image->ramdisk[i];
        u32 end = joined.start + joined.size;
        if (next.start == end + SECTION_HEADER_SIZE) {
            clear(memory(end), SECTION_HEADER_SIZE);
            joined.size += SECTION_HEADER_SIZE + next.size;
        } else {
            copy(memory(end), memory(next.start), next.size);
            joined.size += next.size;
        }
    }
    return joined;
}

/* ---- the kernel ---- */

static void check_kernel(const struct image *image, const u8 *setup)
{
    if (image->kernel.size < SETUP_HEADER_END)
        refuse("kernel size", image->kernel.size, "a bzImage");
    if (le16(setup + BOOT_FLAG) != 0xaa55 || le32(setup + HEADER_MAGIC) != 0x53726448)
        refuse("kernel magic", le32(setup + HEADER_MAGIC), "0x53726448 of a bzImage");
    if (le16(setup + PROTOCOL_VERSION) < 0x20c)
        refuse("kernel boot protocol", le16(setup + PROTOCOL_VERSION), "0x20c or newer");
    if (!(setup[LOADFLAGS] & 1))
        refuse("kernel load flags", setup[LOADFLAGS], "bit 0, loaded high");
    if (!setup[RELOCATABLE])
        refuse("kernel relocatable flag", 0, "a relocatable kernel");
    u32 alignment = le32(setup + KERNEL_ALIGNMENT);
    if (!alignment || (alignment & (alignment - 1)))
        refuse("kernel alignment", alignment, "a power of two");
}

static u32 place_kernel(const struct boot_description *boot, const struct image *image, const u8 *setup)
{
    u32 sectors = setup[SETUP_SECTS] ? setup[SETUP_SECTS] : 4, real_mode_size = (sectors + 1) * 512;
    if (image->kernel.size <= real_mode_size)
        refuse("kernel size", image->kernel.size, "more than its real-mode part");
    u32 size = image->kernel.size - real_mode_size;
    u64 needed = le32(setup + INIT_SIZE) > size ? le32(setup + INIT_SIZE) : size;

    /* Below its preferred address the kernel would unpack itself there, over the image perhaps. */
    u64 start = (u64)boot->image_base + boot->image_size, alignment = le32(setup + KERNEL_ALIGNMENT);
    u64 preferred = le64(setup + PREF_ADDRESS);
    if (preferred > boot->low_memory_end)
        refuse("kernel preferred address", preferred, "a place in memory below 4 GiB");
    if (start < preferred)
        start = preferred;
    start = (start + alignment - 1) & ~(alignment - 1);
    if (start > boot->low_memory_end || needed > boot->low_memory_end - start)
        refuse("memory end", boot->low_memory_end, "room for the kernel past the image");
    copy(memory((u32)start), memory(image->kernel.start) + real_mode_size, size);
    return (u32)start;
}

static void write_cmdline(const struct boot_description *boot, const struct image *image, const u8 *setup)
{
    u64 limit = le32(setup + CMDLINE_SIZE) < CMDLINE_LIMIT - 1 ? le32(setup + CMDLINE_SIZE) : CMDLINE_LIMIT - 1;
    u64 size = (u64)image->cmdline.size + boot->suffix_size;
    if (size > limit)
        refuse("command line size", size, "no more than the kernel takes");
    copy(memory(CMDLINE), memory(image->cmdline.start), image->cmdline.size);
    copy(memory(CMDLINE) + image->cmdline.size, memory(ROM_BASE) + boot->suffix_offset, boot->suffix_size);
    memory(CMDLINE)[size] = 0;
}

static void write_zero_page(const struct boot_description *boot, const u8 *setup, u32 entry)
{
    u8 *zero_page = memory(ZERO_PAGE);
    clear(zero_page, 4096);
    /* A hostile length reaches 0x301 at most: into the E820 table, which is written after it. */
    copy(zero_page + SETUP_SECTS, setup + SETUP_SECTS, HEADER_MAGIC + setup[JUMP_OFFSET] - SETUP_SECTS);
    put32(zero_page + ZP_ACPI_RSDP, boot->rsdp);
    zero_page[TYPE_OF_LOADER] = 0xff;
    zero_page[ZP_VID_MODE] = zero_page[ZP_VID_MODE + 1] = 0xff;
    put32(zero_page + CODE32_START, entry);
    put32(zero_page + CMD_LINE_PTR, CMDLINE);
    zero_page[ZP_E820_COUNT] = (u8)boot->e820_count;
    copy(zero_page + ZP_E820, (const u8 *)boot->e820, boot->e820_count * sizeof(struct e820_entry));
}

/* Zero page or start info in EAX, entry in EDX: see entry.S. */
u64 loader_main(void);

u64 loader_main(void)
{
    const struct boot_description *boot = (const struct boot_description *)memory(ROM_BASE);
    struct image image;

    if (le32(memory(RESTART_MARKER)) == BOOT_MAGIC) {
        /* A kernel with no way to reset jumped back to the reset vector: its memory is no image any more. */
        print("loader: the kernel restarted the machine\r\n");
        stop();
    }
    put32(memory(RESTART_MARKER), BOOT_MAGIC);
    if (boot->protocol != PROTOCOL_EIF)
        return (u64)boot->entry << 32 | boot->argument;

    find_sections(boot, &image);
    const u8 *setup = memory(image.kernel.start);
    check_kernel(&image, setup);
    /* All that is taken from the image first: joining the ramdisks may move them over what lies before and between. */
    u32 entry = place_kernel(boot, &image, setup);
    write_cmdline(boot, &image, setup);
    write_zero_page(boot, setup, entry);
    u64 limit = le16(setup + XLOADFLAGS) & 2 ? 0xffffffff : le32(setup + INITRD_ADDR_MAX);
    struct span ramdisk = join_ramdisks(&image);
    if (ramdisk.size && (u64)ramdisk.start + ramdisk.size - 1 > limit)
        refuse("ramdisk end", (u64)ramdisk.start + ramdisk.size, "below the kernel's limit");
    put32(memory(ZERO_PAGE) + RAMDISK_IMAGE, ramdisk.start);
    put32(memory(ZERO_PAGE) + RAMDISK_SIZE, ramdisk.size);
    return (u64)entry << 32 | ZERO_PAGE;
}
