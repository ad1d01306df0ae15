/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The reset vector's target: 16-bit real mode to flat 32-bit protected mode, then loader_main().
 *
 * At reset the CPU is in real mode with CS.base = 0xffff0000; the ROM is 64 KiB there, and again at 0xf0000.
 * The ROM's last 16 bytes hold a jump to entry16, which is the first byte of this file's code (see loader.ld).
 * Source: Intel SDM vol. 3, 9.1.4 (first instruction executed), 9.9.1 (switching to protected mode).
 */

#include "loader.h"

    .section .text.entry, "ax"
    .code16
    .globl entry16
entry16:
    cli
    cld
    /* CS-relative: the ROM is not within reach of DS in real mode. LOADER_OFFSET is this code's offset in the ROM. */
    lgdtl %cs:(gdt_pointer - entry16 + LOADER_OFFSET)
    movl %cr0, %eax
    orb $1, %al             /* CR0.PE */
    movl %eax, %cr0
    ljmpl $0x10, $entry32

    .code32
entry32:
    movw $0x18, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw %ax, %fs
    movw %ax, %gs
    movl $LOADER_STACK_TOP, %esp
    xorl %ebp, %ebp
    call loader_main
    /* Returns the zero page in EAX; the kernel's 32-bit entry is in EDX. Linux: Documentation/arch/x86/boot.rst, 32-bit protocol. */
    movl %eax, %esi
    movl %edx, %eax
    xorl %ebp, %ebp
    xorl %edi, %edi
    xorl %ebx, %ebx
    jmp *%eax

/*
 * stop(): ends the machine. An empty IDT turns the next exception into a triple fault, which resets an x86;
 * a carrier told not to reboot ends there. If it runs on all the same, halt.
 */
    .globl stop
stop:
    lidtl empty_idt
    int3
1:  cli
    hlt
    jmp 1b

    .balign 8
gdt:
    .quad 0
    .quad 0
    /* "Accessed" is set beforehand: the CPU would write it, and this is ROM. */
    .quad 0x00cf9b000000ffff /* 0x10: code, base 0, limit 4 GiB */
    .quad 0x00cf93000000ffff /* 0x18: data, base 0, limit 4 GiB */
gdt_pointer:
    .word . - gdt - 1
    .long gdt
    .balign 4
empty_idt:
    .word 0
    .long 0
