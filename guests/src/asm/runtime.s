# What every guest is made of: the ELF header, tables of the processor, console, parameters.
#
# All guests are assembled by one `global_asm!` (AT&T syntax), because the macros here may be defined only
# once in a linked program and the order of several `global_asm!` blocks is not defined.
#
# An image is one read-only section of the program that embeds it. Nothing in it may need a relocation:
# code is addressed relative to RIP, and what must be absolute (descriptor tables, page tables, the entry)
# is computed as `label - IMAGE + LOAD`, a constant of the assembler. LOAD's low 16 bits are zero and an
# image is at most 64 KiB, so that a label's low 16 bits are `label - IMAGE`, and its next 16 bits LOAD >> 16:
# this is what lets IDT gates and the TSS descriptor be assembled rather than built at run time, which counts
# where CPL0 code runs at some 2 million instructions a second.

.set LOAD,          0x100000            # where every image is linked and loaded
.set WORK,          LOAD + 0x10000      # memory of the guest behind its image; not assumed to be zero
.set STACK,         WORK + 0x4000       # top of the stack of the first processor at CPL0
.set SCRATCH,       WORK + 0x4000       # 48 KiB for the guest's own use
.set IMAGE_MEMORY,  0x20000             # p_memsz: image, WORK
.set FREE,          0x200000            # first address that the image does not use

.set SERIAL,        0x3f8
.set DEBUG_EXIT,    0xf4
.set SLEEP_CONTROL, 0x600
.set REPORT_LOW,    0x5d0
.set REPORT_HIGH,   0x5d4

.set KERNEL_CODE,   0x08
.set KERNEL_DATA,   0x10
.set USER_DATA,     0x1b
.set USER_CODE,     0x23
.set TASK,          0x28
.set KERNEL_CODE32, 0x38

.set LAPIC,         0xfee00000

# Opens the image of guest \g: ELF64 header, program headers, and a PVH note when \pvh names an entry.
.macro guest_begin g, pvh=
    .pushsection .rodata.perdure_guest_\g, "a", @progbits
    .balign 4096
    .globl perdure_guest_\g
    .hidden perdure_guest_\g
    .type perdure_guest_\g, @object
perdure_guest_\g:
\g\()_image:
    .byte 0x7f, 0x45, 0x4c, 0x46, 2, 1, 1, 0    # ELF, 64-bit, little-endian
    .quad 0
    .word 2, 62                                 # ET_EXEC, EM_X86_64
    .long 1
    .quad \g\()_entry - \g\()_image + LOAD
    .quad 64, 0                                 # program headers; no sections
    .long 0
  .ifb \pvh
    .word 64, 56, 1, 64, 0, 0
  .else
    .word 64, 56, 2, 64, 0, 0
  .endif
    .long 1, 7                                  # PT_LOAD, RWX: the whole file at LOAD
    .quad 0, LOAD, LOAD, \g\()_end - \g\()_image, IMAGE_MEMORY, 0x1000
  .ifnb \pvh
    .long 4, 4                                  # PT_NOTE, R
    .quad \g\()_note - \g\()_image, \g\()_note - \g\()_image + LOAD, \g\()_note - \g\()_image + LOAD, 20, 20, 4
    .balign 4
\g\()_note:
    .long 4, 4, 18                              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long \pvh - \g\()_image + LOAD
  .endif
    .balign 16
.endm

# Closes the image: the tables that hardware reads, then the end.
# \user is 4 where CPL3 may use the identity mapping of the first GiB, 0 otherwise.
.macro guest_end g, user=0
    .balign 16
\g\()_gdt:
    .quad 0
    .quad 0x00af9b000000ffff                    # 0x08 code, 64-bit, CPL0
    .quad 0x00cf93000000ffff                    # 0x10 data, CPL0
    .quad 0x00cff3000000ffff                    # 0x18 data, CPL3
    .quad 0x00affb000000ffff                    # 0x20 code, 64-bit, CPL3
    .word \g\()_tss_end - \g\()_tss - 1, \g\()_tss - \g\()_image
    .byte LOAD >> 16, 0x89, 0, 0
    .quad 0                                     # 0x28 TSS
    .quad 0x00cf9b000000ffff                    # 0x38 code, 32-bit, CPL0
\g\()_gdt_end:
    .balign 16
\g\()_gdt_pointer:
    .word \g\()_gdt_end - \g\()_gdt - 1
    .quad \g\()_gdt - \g\()_image + LOAD
    .balign 16
\g\()_idt_pointer:
    .word \g\()_idt_end - \g\()_idt - 1
    .quad \g\()_idt - \g\()_image + LOAD
    .balign 4096
\g\()_pml4:
    .quad \g\()_pdpt - \g\()_image + LOAD + 3 + \user
    .fill 511, 8, 0
\g\()_pdpt:
    .quad \g\()_pd_first - \g\()_image + LOAD + 3 + \user, 0, 0
    .quad \g\()_pd_fourth - \g\()_image + LOAD + 3
    .fill 508, 8, 0
\g\()_pd_first:                                 # the first GiB, in pages of 2 MiB
    .set frame, 0x83 + \user
    .rept 512
    .quad frame
    .set frame, frame + 0x200000
    .endr
\g\()_pd_fourth:                                # of the fourth GiB, virtio-mmio, the I/O APIC and the local APIC, uncached
    .fill 128, 8, 0
    .quad 0xd000009b
    .fill 373, 8, 0
    .quad 0xfec0009b, 0xfee0009b
    .fill 8, 8, 0
\g\()_end:
    .globl perdure_guest_\g\()_end
    .hidden perdure_guest_\g\()_end
perdure_guest_\g\()_end:
    .popsection
.endm

# The TSS: the stack of CPL0, and no port is open to CPL3 (the bitmap lies beyond the limit).
.macro plain_tss g
    .balign 16
\g\()_tss:
    .long 0
    .quad STACK
    .fill 90, 1, 0
    .word 104
\g\()_tss_end:
.endm

.macro idt_gate g, handler
    .word \handler - \g\()_image, KERNEL_CODE, 0x8e00, LOAD >> 16
    .quad 0
.endm

# Gates and stubs of the 32 exceptions. Each stub leaves (vector, error code) on the stack and goes to
# \g_exception; the gates must be the first thing in the IDT.
.macro exception_gates g
  .irp v, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    idt_gate \g, \g\()_vector_\v
  .endr
.endm

.macro exception_stubs g
  .irp v, 0,1,2,3,4,5,6,7,9,15,16,18,19,20,22,23,24,25,26,27,28,31
\g\()_vector_\v:
    push $0
    push $\v
    jmp \g\()_exception
  .endr
  .irp v, 8,10,11,12,13,14,17,21,29,30
\g\()_vector_\v:
    push $\v
    jmp \g\()_exception
  .endr
.endm

# An exception that the guest does not expect: say which and where, end with code 3.
.macro fatal_exception g
\g\()_fatal:
    lea \g\()_fatal_text(%rip), %rsi
    call \g\()_puts
    mov (%rsp), %rax
    call \g\()_put_decimal
    lea \g\()_fatal_at(%rip), %rsi
    call \g\()_puts
    mov 16(%rsp), %rax
    call \g\()_put_hex
    lea \g\()_fatal_cr2(%rip), %rsi
    call \g\()_puts
    mov %cr2, %rax
    call \g\()_put_hex
    call \g\()_newline
    mov $3, %al
    jmp \g\()_debug_exit
\g\()_fatal_text: .asciz "exception "
\g\()_fatal_at:   .asciz " at "
\g\()_fatal_cr2:  .asciz " cr2 "
.endm

# Our own GDT, IDT, page tables and TSS in place of the loader's. CS and SS are reloaded by iretq.
# Clobbers rax.
.macro own_machine g
    lgdt \g\()_gdt_pointer(%rip)
    lidt \g\()_idt_pointer(%rip)
    mov $(\g\()_pml4 - \g\()_image + LOAD), %eax
    mov %rax, %cr3
    push $KERNEL_DATA
    push $STACK
    push $2
    push $KERNEL_CODE
    lea 9f(%rip), %rax
    push %rax
    iretq
9:  mov $KERNEL_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov $TASK, %eax
    ltr %ax
.endm

.macro out8 port, value
    mov $\value, %al
  .if \port < 256
    out %al, $\port
  .else
    mov $\port, %edx
    out %al, %dx
  .endif
.endm

# Both PICs at vectors 0x20 and 0x28, open for the lines that \mask leaves zero, delivered through LINT0 of
# this processor's local APIC (ExtINT, the virtual wire of the MultiProcessor Specification).
.macro pic_through_lint0 mask
    mov $LAPIC, %edi
    movl $0x1ff, 0xf0(%rdi)
    movl $0x700, 0x350(%rdi)
    out8 0x20, 0x11
    out8 0xa0, 0x11
    out8 0x21, 0x20
    out8 0xa1, 0x28
    out8 0x21, 4
    out8 0xa1, 2
    out8 0x21, 1
    out8 0xa1, 1
    out8 0x21, \mask
    out8 0xa1, 0xff
.endm

# Lets the PIT's channel 0 interrupt rcx times a second, 19 (what its counter holds) to 10000. Clobbers rax, rcx and rdx.
.macro pit_periodic
    mov $19, %eax
    cmp %rax, %rcx
    cmovb %rax, %rcx
    mov $10000, %eax
    cmp %rax, %rcx
    cmova %rax, %rcx
    mov $1193182, %eax
    xor %edx, %edx
    div %rcx
    mov %eax, %ecx
    out8 0x43, 0x34
    mov %cl, %al
    out %al, $0x40
    mov %ch, %al
    out %al, $0x40
.endm

# Console, numbers, parameters, endings. All may clobber rax, rcx, rdx, rsi and nothing else, unless said.
.macro runtime g

# Sends al. Leaves rax.
\g\()_putc:
    push %rax
    mov $(SERIAL + 5), %edx
1:  in %dx, %al
    test $0x20, %al
    jz 1b
    pop %rax
    mov $SERIAL, %edx
    out %al, %dx
    ret

\g\()_newline:
    mov $10, %al
    jmp \g\()_putc

# Sends the text at rsi up to its NUL.
\g\()_puts:
    mov (%rsi), %al
    test %al, %al
    jz 1f
    call \g\()_putc
    inc %rsi
    jmp \g\()_puts
1:  ret

# Sends rax as 16 hexadecimal digits.
\g\()_put_hex:
    mov %rax, %rsi
    mov $16, %ecx
1:  rol $4, %rsi
    mov %esi, %eax
    and $15, %eax
    cmp $10, %al
    jb 2f
    add $39, %al
2:  add $48, %al
    call \g\()_putc
    dec %ecx
    jnz 1b
    ret

# Sends rax in decimal.
\g\()_put_decimal:
    xor %ecx, %ecx
    mov $10, %esi
1:  xor %edx, %edx
    div %rsi
    add $48, %dl
    push %rdx
    inc %ecx
    test %rax, %rax
    jnz 1b
2:  pop %rax
    call \g\()_putc
    dec %ecx
    jnz 2b
    ret

# Where the command line lies. From boot_params at rsi.
\g\()_linux_cmdline:
    mov 0x228(%rsi), %eax
    mov 0xc8(%rsi), %ecx
    shl $32, %rcx
    or %rcx, %rax
    mov %rax, \g\()_cmdline(%rip)
    ret

# Finds the word that begins with the key at rsi ("hz="); rax is the address behind the key, or 0.
# A later word wins over an earlier one. Clobbers rdi too.
\g\()_find_word:
    xor %eax, %eax
    mov \g\()_cmdline(%rip), %rdi
    test %rdi, %rdi
    jz 9f
1:  cmpb $32, (%rdi)                    # to the start of a word
    jne 2f
    inc %rdi
    jmp 1b
2:  xor %ecx, %ecx
3:  mov (%rsi,%rcx), %dl
    test %dl, %dl
    jz 4f
    cmp %dl, (%rdi,%rcx)
    jne 5f
    inc %ecx
    jmp 3b
4:  lea (%rdi,%rcx), %rax
5:  cmpb $0, (%rdi)                     # to the end of the word
    je 9f
    cmpb $32, (%rdi)
    je 1b
    inc %rdi
    jmp 5b
9:  ret

# The number at rax with an optional suffix K, M, G (binary), into rax. Clobbers rdi too.
\g\()_parse_number:
    mov %rax, %rdi
    xor %eax, %eax
1:  movzbl (%rdi), %ecx
    inc %rdi
    sub $48, %ecx
    cmp $9, %ecx
    ja 2f
    imul $10, %rax
    add %rcx, %rax
    jmp 1b
2:  add $48, %ecx
    or $32, %ecx
    cmp $0x6b, %ecx                     # k
    je 5f
    cmp $0x6d, %ecx                     # m
    je 4f
    cmp $0x67, %ecx                     # g
    jne 9f
    shl $10, %rax
4:  shl $10, %rax
5:  shl $10, %rax
9:  ret

# The index of the word at rax among the NUL-terminated names at rdi (an empty one ends the list), into rax;
# left at 0 when there is none such. Clobbers rdi too.
\g\()_parse_name:
    xor %edx, %edx
1:  cmpb $0, (%rdi)
    je 8f
    xor %ecx, %ecx
2:  cmpb $0, (%rdi,%rcx)
    je 4f
    mov (%rdi,%rcx), %sil
    cmp %sil, (%rax,%rcx)
    jne 5f
    inc %ecx
    jmp 2b
4:  mov (%rax,%rcx), %sil               # the word must end where the name does
    test %sil, %sil
    jz 7f
    cmp $32, %sil
    je 7f
5:  cmpb $0, (%rdi)
    je 6f
    inc %rdi
    jmp 5b
6:  inc %rdi
    inc %edx
    jmp 1b
7:  mov %edx, %eax
    ret
8:  xor %eax, %eax
    ret

# Reads the parameters of the table \g_parameters from the command line and prints the line that tells what
# is in force: " key=value" each. Clobbers rdi, rbx too.
\g\()_read_parameters:
    lea \g\()_parameters(%rip), %rbx
1:  mov (%rbx), %rsi
    test %rsi, %rsi
    jz \g\()_newline
    call \g\()_find_word
    test %rax, %rax
    jz 3f
    mov 16(%rbx), %rdi
    test %rdi, %rdi
    jnz 2f
    call \g\()_parse_number
    mov %rax, 8(%rbx)
    jmp 3f
2:  call \g\()_parse_name
    mov %rax, 8(%rbx)
3:  mov $32, %al
    call \g\()_putc
    mov (%rbx), %rsi
    call \g\()_puts
    mov 16(%rbx), %rsi
    test %rsi, %rsi
    jnz 4f
    mov 8(%rbx), %rax
    call \g\()_put_decimal
    jmp 7f
4:  mov 8(%rbx), %rcx                   # the name with this index
5:  jrcxz 6f
    lodsb
    test %al, %al
    jnz 5b
    dec %rcx
    jmp 5b
6:  call \g\()_puts
7:  add $24, %rbx
    jmp 1b

# Commits rax as the report of the guest.
\g\()_report:
    mov $REPORT_LOW, %edx
    out %eax, %dx
    shr $32, %rax
    mov $REPORT_HIGH, %edx
    out %eax, %dx
    ret

# Ends the machine with code al.
\g\()_debug_exit:
    out %al, $DEBUG_EXIT
1:  cli
    hlt
    jmp 1b

# ACPI S5 through the sleep control register: SLP_TYP 5, SLP_EN.
\g\()_power_off:
    mov $0x34, %al
    mov $SLEEP_CONTROL, %edx
    out %al, %dx
1:  cli
    hlt
    jmp 1b

    .balign 8
\g\()_cmdline: .quad 0
.endm

# A table of parameters: rows of (key, value, names), closed by `parameters_end`. The value is the default until it
# is read, and is addressed as \g_\name; `names` lists the words it may be, and is absent for a number.
.macro parameter g, name, default, names=
    .quad \g\()_key_\name - \g\()_image + LOAD
\g\()_\name:
    .quad \default
  .ifb \names
    .quad 0
  .else
    .quad \names - \g\()_image + LOAD
  .endif
.endm

.macro parameters_end
    .quad 0
.endm

.macro parameter_key g, name
\g\()_key_\name:
    .asciz "\name="
.endm
