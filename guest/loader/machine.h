/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the loader needs of a machine. Tests define all of this for an ordinary program (tests/loader/harness.c), so that
 * sanitizers see every access.
 */
#ifndef MACHINE_H
#define MACHINE_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }

static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u8 *memory(u32 address) { return (u8 *)address; }

/* Forward copy; also right for overlapping ranges that move down. */
static void copy(u8 *to, const u8 *from, u32 size)
{
    u32 words = size / 4, rest = size % 4;
    __asm__ volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(rest) : : "memory");
}

static void clear(u8 *to, u32 size)
{
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(0) : "memory");
}

/* Ends the machine: entry.S. */
void stop(void) __attribute__((noreturn));

#endif
