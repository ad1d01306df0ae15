/* SPDX-License-Identifier: Apache-2.0 */
/* Real mode at 1000:0000 to flat 32-bit code, then guest_main(); an interrupt's entry; a second CPU's first steps. */
    .section .text.entry, "ax"
    .code16
    .globl entry
entry:
    cli
    cld
    lgdtl %cs:(gdt_pointer - entry)
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $0x10, $entry32

    .code32
    .org 0x40, 0x90
    .globl entry32
entry32:                        /* at 0x10040, for who is in this mode already */
    movw $0x18, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x9000, %esp
    call guest_main
1:  hlt
    jmp 1b

    .globl interrupt_entry
interrupt_entry:
    pushal
    call on_interrupt
    popal
    /* An iret, in instructions that every KVM can emulate: flags back, then a far return that drops them. */
    pushl 8(%esp)
    popfl
    lretl $4

/* Copied to 0x20000, where a SIPI with vector 0x20 leads. */
    .code16
    .globl second_cpu, second_cpu_end
second_cpu:
    xorw %ax, %ax
    movw %ax, %ds
    movb $0x5a, 0x500
1:  hlt
    jmp 1b
second_cpu_end:

    .balign 8
gdt:
    .quad 0
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
gdt_pointer:
    .word . - gdt - 1
    .long gdt
