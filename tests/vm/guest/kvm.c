/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest: what it does is in the byte at 0x600.
 *
 *   'e'  drives virtio-vsock at 0xd0000000, IRQ 5: accepts connections to any port and echoes what comes, a byte 'q' ends it
 *   'h'  the same, for connections to port 9 alone; before, it sends init's heartbeat
 *   's'  starts the second CPU by INIT and SIPI, and says so
 *   'i'  echoes the serial port, by its interrupt
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static u8 inb(u16 port) { u8 value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static void say(const char *text) { while (*text) outb(0x3f8, (u8)*text++); }
static void end(void) { outb(0x64, 0xfe); for (;;) __asm__ volatile("hlt"); }
static volatile u32 *reg(u32 offset) { return (volatile u32 *)(0xd0000000 + offset); }
static void copy(volatile u8 *to, const volatile u8 *from, u32 size) { while (size--) *to++ = *from++; }

extern void interrupt_entry(void);
extern u8 second_cpu[], second_cpu_end[];

enum { HEARTBEAT_PORT = 9000, OWN_PORT = 5000, ECHO_PORT = 9 };

static volatile u32 interrupts;
static u8 mode;

void on_interrupt(void);
void on_interrupt(void)
{
    interrupts++;
    if (mode == 'e' || mode == 'h')
        *reg(0x64) = *reg(0x60);
    else
        while (inb(0x3fd) & 1)
            outb(0x3f8, inb(0x3f8));
    outb(0x20, 0x20);
}

/* One gate at vector 0x20 + irq, through the first interrupt controller. */
static void take_interrupts(u32 irq)
{
    static struct { u16 low, selector, zero_and_type, high; } gates[64] __attribute__((aligned(8)));
    static struct { u16 limit; u32 base; } __attribute__((packed)) pointer;
    u32 address = (u32)interrupt_entry;
    gates[0x20 + irq].low = (u16)address;
    gates[0x20 + irq].selector = 0x10;
    gates[0x20 + irq].zero_and_type = 0x8e00;
    gates[0x20 + irq].high = (u16)(address >> 16);
    pointer.limit = sizeof gates - 1;
    pointer.base = (u32)gates;
    __asm__ volatile("lidt %0" : : "m"(pointer));
    outb(0x20, 0x11); outb(0x21, 0x20); outb(0x21, 4); outb(0x21, 1);
    outb(0x21, (u8)~(1 << irq));
    __asm__ volatile("sti");
}

/* ---- virtio-vsock ---- */

enum { SIZE = 8, SLOT = 512, HEADER = 44, REQUEST = 1, RESPONSE = 2, RST = 3, SHUTDOWN = 4, RW = 5 };

struct descriptor { u64 address; u32 length; u16 flags, next; };
struct available { u16 flags, index, ring[SIZE]; };
struct used { u16 flags, index; struct { u32 id, length; } ring[SIZE]; };
struct header { u64 source_cid, destination_cid; u32 source_port, destination_port, length; u16 type, op; u32 flags, buffer, forwarded; }
    __attribute__((packed));

static struct queue {
    struct descriptor descriptors[SIZE] __attribute__((aligned(16)));
    volatile struct available available;
    volatile struct used used __attribute__((aligned(4)));
    u16 seen;
    u8 buffers[SIZE][SLOT];
} queues[2] __attribute__((aligned(16)));

static void offer(u32 number, u32 index, u32 length)
{
    struct queue *queue = &queues[number];
    queue->descriptors[index].length = length;
    queue->available.ring[queue->available.index % SIZE] = (u16)index;
    __asm__ volatile("" : : : "memory");
    queue->available.index++;
    *reg(0x50) = number;
}

static void set_up(void)
{
    *reg(0x70) = 0;
    *reg(0x70) = 3;
    *reg(0x24) = 1;
    *reg(0x20) = 1;             /* VERSION_1 */
    *reg(0x70) = 11;
    for (u32 number = 0; number < 2; number++) {
        struct queue *queue = &queues[number];
        for (u32 index = 0; index < SIZE; index++) {
            queue->descriptors[index].address = (u32)queue->buffers[index];
            queue->descriptors[index].flags = number ? 0 : 2;
        }
        *reg(0x30) = number;
        *reg(0x38) = SIZE;
        *reg(0x80) = (u32)queue->descriptors; *reg(0x84) = 0;
        *reg(0x90) = (u32)&queue->available; *reg(0x94) = 0;
        *reg(0xa0) = (u32)&queue->used; *reg(0xa4) = 0;
        *reg(0x44) = 1;
    }
    *reg(0x70) = 15;
    for (u32 index = 0; index < SIZE; index++)
        offer(0, index, SLOT);
}

static u32 sent, received;

static void answer(const struct header *from, u16 op, const u8 *data, u32 length)
{
    u32 index = sent++ % SIZE;
    u8 *to = queues[1].buffers[index];
    struct header header = { from->destination_cid, from->source_cid, from->destination_port, from->source_port, length,
                             1, op, 0, 65536, received };
    while ((u16)(sent - 1 - queues[1].used.index) >= SIZE)
        __asm__ volatile("hlt");
    copy(to, (u8 *)&header, HEADER);
    copy(to + HEADER, data, length);
    offer(1, index, HEADER + length);
}

static void echo(void)
{
    take_interrupts(5);
    set_up();
    say("ready\n");
    if (mode == 'h') {
        struct header parent = { 3, *reg(0x100), HEARTBEAT_PORT, OWN_PORT, 0, 0, 0, 0, 0, 0 };
        answer(&parent, REQUEST, 0, 0);
    }
    for (;;) {
        /* Looked at with interrupts off, or the one that matters could come before the hlt. */
        __asm__ volatile("cli");
        if (queues[0].seen == queues[0].used.index) {
            __asm__ volatile("sti; hlt");
            continue;
        }
        __asm__ volatile("sti");
        u32 index = queues[0].used.ring[queues[0].seen++ % SIZE].id;
        const struct header *header = (const struct header *)queues[0].buffers[index];
        const u8 *data = queues[0].buffers[index] + HEADER;
        if (header->op == RESPONSE) {
            u8 beat = 0xb7;
            answer(header, RW, &beat, 1);
        } else if (header->op == RW && header->destination_port == OWN_PORT) {
            received += header->length;
        } else if (header->op == REQUEST && mode == 'h' && header->destination_port != ECHO_PORT) {
            answer(header, RST, data, 0);
        } else if (header->op == REQUEST) {
            received = 0;       /* one connection at a time */
            answer(header, RESPONSE, data, 0);
        } else if (header->op == SHUTDOWN)
            answer(header, RST, data, 0);
        else if (header->op == RW) {
            received += header->length;
            answer(header, RW, data, header->length);
            if (data[0] == 'q') {
                say(interrupts ? "interrupted\n" : "never interrupted\n");
                end();
            }
        }
        offer(0, index, SLOT);
    }
}

static void start_second_cpu(void)
{
    volatile u32 *icr = (volatile u32 *)0xfee00300;
    volatile u8 *marker = (volatile u8 *)0x500;
    copy((u8 *)0x20000, second_cpu, (u32)(second_cpu_end - second_cpu));
    *(volatile u32 *)0xfee000f0 = 0x1ff;
    icr[4] = 1 << 24;
    icr[0] = 0x4500;            /* INIT */
    icr[0] = 0x4620;            /* SIPI to page 0x20 */
    while (*marker != 0x5a)
        ;
    say("second\n");
    end();
}

void guest_main(void);
void guest_main(void)
{
    mode = *(volatile u8 *)0x600;
    if (mode == 'e' || mode == 'h')
        echo();
    if (mode == 's')
        start_second_cpu();
    outb(0x3fc, 8);
    outb(0x3f9, 1);
    take_interrupts(4);
    say("type\n");
}
