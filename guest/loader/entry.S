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
    xorw %ax, %ax
    movw %ax, %ds
    /* Here a second time: loader_main() has the words for it. */
    cmpl $BOOT_MAGIC, RESTART_MARKER
    je enter_protected_mode
    /* CS-relative: the ROM, whose first bytes are the boot description. */
    cmpl $PROTOCOL_REALMODE, %cs:BOOT_PROTOCOL
    je enter_setup
enter_protected_mode:
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
    /*
     * Returns the zero page, or PVH's start info, in EAX; the kernel's 32-bit entry is in EDX.
     * Linux: Documentation/arch/x86/boot.rst, 32-bit protocol. Xen: docs/misc/pvh.pandoc.
     */
    xorl %ebx, %ebx
    movl %eax, %esi
    cmpl $PROTOCOL_PVH, ROM_BASE + BOOT_PROTOCOL
    jne 1f
    movl %eax, %ebx
1:  movb $MARKER_LOADER_END, %al
    outb %al, $MARKER_PORT
    xorl %ebp, %ebp
    xorl %edi, %edi
    jmp *%edx

/*
 * Real mode: what a BIOS would have left, as little of it as the kernel's setup asks for; then into that setup.
 * Every interrupt returns at once, with the carry flag as it was (set by the caller: "not supported"), but for
 * two services. Linux: arch/x86/boot/{header.S,memory.c,video*.c,tty.c}.
 */
    .code16
#define IN_ROM(label) (label - entry16 + LOADER_OFFSET)
#define VECTOR(label) (0xf0000000 + IN_ROM(label))
enter_setup:
    movl $BOOT_MAGIC, RESTART_MARKER
    /* The ROM's alias below 1 MiB: interrupts and far jumps lead there. */
    ljmpw $0xf000, $IN_ROM(in_alias)
in_alias:
    movw %ax, %es
    xorw %di, %di
    movw $256, %cx
    movl $VECTOR(interrupt_return), %eax
    rep stosl
    movl $VECTOR(interrupt_video), 4 * 0x10
    movl $VECTOR(interrupt_system), 4 * 0x15
    movw $0x9fc0, BDA_EBDA
    movw $639, BDA_BASE_MEMORY
    movb $MARKER_LOADER_END, %al
    outb %al, $MARKER_PORT
    movw $SETUP_SEGMENT, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %fs
    movw %ax, %gs
    movw %ax, %ss
    movw $SETUP_STACK_TOP, %sp
    ljmpw $SETUP_SEGMENT + 0x20, $0

interrupt_return:
    iretw

/* INT 10h, AH = 0Eh: AL to the serial port. */
interrupt_video:
    cmpb $0x0e, %ah
    jne interrupt_return
    pushw %ax
    pushw %dx
    pushw %cx
    movb %al, %ah
    movw $COM1_LINE_STATUS, %dx
    xorw %cx, %cx
1:  inb %dx, %al
    testb $LSR_THR_EMPTY, %al
    loopz 1b
    movw $COM1, %dx
    movb %ah, %al
    outb %al, %dx
    popw %cx
    popw %dx
    popw %ax
    iretw

/*
 * INT 15h, EAX = E820h, EDX = "SMAP": entry EBX of the memory map, 20 bytes to ES:DI. EBX becomes the next one's
 * number, 0 after the last; EAX "SMAP", ECX 20. All other functions fail.
 */
interrupt_system:
    cmpl $0xe820, %eax
    jne 2f
    cmpl $0x534d4150, %edx
    jne 2f
    cmpl $20, %ecx
    jb 2f
    cmpl %cs:BOOT_E820_COUNT, %ebx
    jae 2f
    pushw %si
    pushw %di
    imulw $20, %bx, %si
    addw $BOOT_E820, %si
    movw $5, %cx
    rep movsl %cs:(%si), %es:(%di)
    popw %di
    popw %si
    incl %ebx
    cmpl %cs:BOOT_E820_COUNT, %ebx
    jb 1f
    xorl %ebx, %ebx
1:  movl %edx, %eax
    movl $20, %ecx
    pushw %bp
    movw %sp, %bp
    andb $~1, 6(%bp)        /* the carry flag that iret restores */
    popw %bp
    iretw
2:  movb $0x86, %ah
    pushw %bp
    movw %sp, %bp
    orb $1, 6(%bp)
    popw %bp
    iretw

    .code32
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
