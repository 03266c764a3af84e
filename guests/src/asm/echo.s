# echo: gives back serial input line by line, with a running count and hash. Entered by PVH or as Linux is.
# What it prints is defined in `echo.rs`.
#
# r12 bytes, r13 lines, r14 length of the line so far, r15 hash. The interrupt handler fills a ring; where that
# is full it turns the receive interrupt off, so that the sender waits and nothing is lost.

.set ECHO_LINE,      SCRATCH            # the line so far
.set ECHO_LINE_MAX,  240
.set ECHO_RING,      SCRATCH + 0x1000
.set ECHO_RING_MASK, 0xfff

    guest_begin echo, echo_entry32

    .code32
echo_entry32:
    cli
    cld
    mov $STACK, %esp
    mov 24(%ebx), %eax                  # hvm_start_info.cmdline_paddr
    mov %eax, (echo_cmdline - echo_image + LOAD)
    mov 28(%ebx), %eax
    mov %eax, (echo_cmdline - echo_image + LOAD + 4)
    lgdt (echo_gdt_pointer - echo_image + LOAD)
    mov $(echo_pml4 - echo_image + LOAD), %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax                      # PAE
    mov %eax, %cr4
    mov $0xc0000080, %ecx               # EFER.LME
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax
    mov %eax, %cr0
    ljmpl $KERNEL_CODE, $(echo_long - echo_image + LOAD)
    .code64

echo_entry:
    cli
    cld
    mov $STACK, %esp
    call echo_linux_cmdline
echo_long:
    mov $STACK, %esp
    lea echo_name(%rip), %rsi
    call echo_puts
    own_machine echo
    call echo_read_parameters
    xor %r12d, %r12d
    xor %r13d, %r13d
    xor %r14d, %r14d
    mov echo_seed(%rip), %r15
    pic_through_lint0 0xef
    out8 SERIAL + 3, 3                  # 8 bits, no parity
    out8 SERIAL + 2, 1                  # FIFO on, interrupt at its first byte
    out8 SERIAL + 4, 0x0b               # DTR, RTS, OUT2: the interrupt reaches the PIC
    out8 SERIAL + 1, 1                  # receive interrupt
    lea echo_text_ready(%rip), %rsi
    call echo_puts

echo_next:
    cli
    mov echo_tail(%rip), %rax
    cmp echo_head(%rip), %rax
    jne 2f
    cmpb $0, echo_throttled(%rip)
    je 1f
    movb $0, echo_throttled(%rip)       # room again: take what waits, as no edge may come for it
    out8 SERIAL + 1, 1
    call echo_receive
    jmp echo_next
1:  sti
    hlt
    jmp echo_next
2:  mov %rax, %rcx
    and $ECHO_RING_MASK, %ecx
    movzbl ECHO_RING(%rcx), %ebx
    inc %rax
    mov %rax, echo_tail(%rip)
    sti
    cmp $10, %bl
    je 3f
    cmp $13, %bl
    je 3f
    mov %bl, ECHO_LINE(%r14)
    inc %r14
    inc %r12
    movzbl %bl, %eax
    call echo_fold
    cmp $ECHO_LINE_MAX, %r14
    jb echo_next
3:  test %r14, %r14
    jz echo_next                        # CR LF and empty lines give nothing
    mov $10, %eax
    call echo_fold
    inc %r13
    lea echo_text_line(%rip), %rsi
    call echo_puts
    mov %r13, %rax
    call echo_put_decimal
    mov $32, %al
    call echo_putc
    mov %r15, %rax
    call echo_put_hex
    mov $32, %al
    call echo_putc
    movb $0, ECHO_LINE(%r14)
    xor %ebx, %ebx
4:  mov ECHO_LINE(%rbx), %al
    call echo_putc
    inc %rbx
    cmp %r14, %rbx
    jb 4b
    call echo_newline
    mov %r14, %rcx
    xor %r14d, %r14d
    cmp $4, %rcx
    jne echo_next
    cmpl $0x74697571, ECHO_LINE         # "quit"
    jne echo_next
    lea echo_text_bye(%rip), %rsi
    call echo_puts
    mov %r13, %rax
    call echo_put_decimal
    mov $32, %al
    call echo_putc
    mov %r12, %rax
    call echo_put_decimal
    mov $32, %al
    call echo_putc
    mov %r15, %rax
    call echo_put_hex
    call echo_newline
    cli
    jmp echo_power_off

# Folds rax into the hash.
echo_fold:
    rol $5, %r15
    xor %rax, %r15
    imul echo_multiplier(%rip), %r15
    ret

# Moves what the serial line has into the ring. Clobbers rax, rcx, rdx.
echo_receive:
    mov $(SERIAL + 5), %edx
    in %dx, %al
    test $1, %al
    jz 2f
    mov echo_head(%rip), %rcx
    mov %rcx, %rax
    sub echo_tail(%rip), %rax
    cmp $ECHO_RING_MASK, %rax
    ja 1f
    mov $SERIAL, %edx
    in %dx, %al
    incq echo_head(%rip)
    and $ECHO_RING_MASK, %ecx
    mov %al, ECHO_RING(%rcx)
    jmp echo_receive
1:  movb $1, echo_throttled(%rip)
    out8 SERIAL + 1, 0
2:  ret

echo_serial:
    push %rax
    push %rcx
    push %rdx
    call echo_receive
    mov $0x20, %al
    out %al, $0x20
    pop %rdx
    pop %rcx
    pop %rax
    iretq

echo_spurious:
    iretq

echo_exception:
    jmp echo_fatal

    runtime echo
    fatal_exception echo
    exception_stubs echo
    plain_tss echo
    .balign 16
echo_idt:
    exception_gates echo
  .rept 4
    idt_gate echo, echo_spurious
  .endr
    idt_gate echo, echo_serial
  .rept 11
    idt_gate echo, echo_spurious
  .endr
echo_idt_end:
    .balign 8
echo_seed:       .quad 0x70657264757265
echo_multiplier: .quad 0x517cc1b727220a95
echo_head:       .quad 0
echo_tail:       .quad 0
echo_throttled:  .byte 0
    .balign 8
echo_parameters:
    parameters_end
echo_name:       .asciz "echo"
echo_text_ready: .asciz "ready\n"
echo_text_line:  .asciz "line "
echo_text_bye:   .asciz "bye "

    guest_end echo
