# counter: counts timer interrupts and chains a hash over everything that an outage could harm.
# The chain is defined in `chain.rs`; the two must agree to the bit.
#
# Registers that live across the whole run: r15 hash, r14 number of the last tick done. All others are
# filled from the hash before the processor idles and folded into it afterwards.

.set COUNTER_LIVE_WORDS, 13 + 8 + 32
.set COUNTER_XMM, SCRATCH               # 16 * 16 bytes, to load and store XMM registers
.set COUNTER_LIVE, SCRATCH + 0x200      # what was found in the registers after idling

    guest_begin counter

counter_entry:
    cli
    cld
    mov $STACK, %esp
    mov %rsi, %r12
    lea counter_name(%rip), %rsi        # the first byte before any other work: benches time it
    call counter_puts
    own_machine counter
    mov %cr4, %rax
    or $0x600, %eax                     # OSFXSR, OSXMMEXCPT
    mov %rax, %cr4
    mov %cr0, %rax
    and $~0x0e, %eax                    # MP, EM, TS off: XMM moves must neither trap nor be undefined
    mov %rax, %cr0
    mov %r12, %rsi
    call counter_linux_cmdline
    call counter_read_parameters
    call counter_lay_out
    pic_through_lint0 0xfe

    mov counter_hz(%rip), %rcx
    pit_periodic

    xor %r14d, %r14d
    mov counter_seed(%rip), %r15

counter_idle:
    call counter_fill_registers
1:  cli
    cmp %r14, counter_interrupts(%rip)
    jne 2f
    sti
    hlt
    jmp 1b
2:  sti                                 # the tick's work may itself be interrupted, anywhere
    call counter_collect_registers
    inc %r14
    incq counter_done(%rip)
    cmp %r14, counter_done(%rip)
    jne counter_broken_number
    call counter_fold_registers
    call counter_fold_line
    mov counter_every(%rip), %rcx
    jrcxz 3f
    mov %r14, %rax
    xor %edx, %edx
    div %rcx
    test %rdx, %rdx
    jnz 3f
    lea counter_text_tick(%rip), %rsi
    call counter_print_tick
3:  cmp %r14, counter_ticks(%rip)
    jne counter_idle
    cli
    lea counter_text_done(%rip), %rsi
    call counter_print_tick
    jmp counter_power_off

# Prints the text at rsi, the tick's number and the hash.
counter_print_tick:
    call counter_puts
    mov %r14, %rax
    call counter_put_decimal
    mov $32, %al
    call counter_putc
    mov %r15, %rax
    call counter_put_hex
    jmp counter_newline

# Spreads `ram` bytes as pages evenly over the usable memory that holds FREE, below 1 GiB; behind FREE itself
# lies the shadow, one word a line. r12 = boot_params.
counter_lay_out:
    movzbl 0x1e8(%r12), %ecx
    lea 0x2d0(%r12), %rsi
    mov $FREE, %edi
1:  test %ecx, %ecx
    jz counter_no_room
    mov (%rsi), %rax                    # the e820 entry: base, size, type
    mov 8(%rsi), %rdx
    add %rax, %rdx
    cmpl $1, 16(%rsi)
    jne 2f
    cmp %rdi, %rax
    ja 2f
    cmp %rdi, %rdx
    ja 3f
2:  add $20, %rsi
    dec %ecx
    jmp 1b
3:  mov $0x40000000, %eax
    cmp %rax, %rdx
    cmova %rax, %rdx
    mov counter_ram(%rip), %rcx
    shr $12, %rcx
    jz counter_no_room
    mov %rcx, counter_pages(%rip)
    shl $3, %rcx
    mov %rcx, counter_lines(%rip)
    lea 4095(%rdi,%rcx,8), %rsi         # the first page behind the shadow
    and $-4096, %rsi
    mov %rsi, counter_window(%rip)
    sub %rsi, %rdx
    jbe counter_no_room
    mov %rdx, %rax
    shr $12, %rax
    xor %edx, %edx
    divq counter_pages(%rip)
    test %rax, %rax
    jz counter_no_room
    shl $12, %rax
    mov %rax, counter_stride(%rip)
    ret
counter_no_room:
    lea counter_text_no_room(%rip), %rsi
    call counter_puts
    mov $2, %al
    jmp counter_debug_exit

# Every register but rsp, r14, r15 gets hash + k * STEP, k = 1, 2, …; those that hold an address keep 47 bits.
counter_fill_registers:
    mov counter_step(%rip), %rbx
    imul $13, %rbx, %r8                 # the 13 general registers come last
    add %r15, %r8
    mov counter_mask(%rip), %r9
  .macro counter_next_address
    add %rbx, %r8
    mov %r8, %rax
    and %r9, %rax
  .endm
    counter_next_address
    mov %rax, %cr2
    counter_next_address
    mov %rax, %dr0
    counter_next_address
    mov %rax, %dr1
    counter_next_address
    mov %rax, %dr2
    counter_next_address
    mov %rax, %dr3
  .irp msr, 0xc0000100, 0xc0000101, 0xc0000102   # bases of FS, GS, and the other GS
    counter_next_address
    mov %rax, %rdx
    shr $32, %rdx
    mov $\msr, %ecx
    wrmsr
  .endr
    mov $COUNTER_XMM, %edi
    mov $32, %ecx
1:  add %rbx, %r8
    mov %r8, (%rdi)
    add $8, %rdi
    dec %ecx
    jnz 1b
    mov $COUNTER_XMM, %edi
  .irp x, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    movdqu \x * 16(%rdi), %xmm\x
  .endr
    mov %r15, %rax
  .irp r, rbx,rcx,rdx,rsi,rdi,rbp,r8,r9,r10,r11,r12,r13
    add counter_step(%rip), %rax
    mov %rax, %\r
  .endr
    add counter_step(%rip), %rax
    ret

# Stores those registers to COUNTER_LIVE, in the same order.
counter_collect_registers:
    mov %rax, COUNTER_LIVE + 12 * 8
    .set offset, 0
  .irp r, rbx,rcx,rdx,rsi,rdi,rbp,r8,r9,r10,r11,r12,r13
    mov %\r, COUNTER_LIVE + offset
    .set offset, offset + 8
  .endr
    mov %cr2, %rax
    mov %rax, COUNTER_LIVE + 13 * 8
    .set offset, 14 * 8
  .irp d, 0,1,2,3
    mov %dr\d, %rax
    mov %rax, COUNTER_LIVE + offset
    .set offset, offset + 8
  .endr
  .irp msr, 0xc0000100, 0xc0000101, 0xc0000102
    mov $\msr, %ecx
    rdmsr
    mov %eax, COUNTER_LIVE + offset
    mov %edx, COUNTER_LIVE + offset + 4
    .set offset, offset + 8
  .endr
    mov $(COUNTER_LIVE + 21 * 8), %edi
  .irp x, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    movdqu %xmm\x, \x * 16(%rdi)
  .endr
    ret

# Folds the tick's number and the collected registers into the hash; each register is first compared with
# what was put there.
counter_fold_registers:
    mov counter_multiplier(%rip), %r8
    mov counter_step(%rip), %r9
    mov %r15, %r10
    rol $5, %r15
    xor %r14, %r15
    imul %r8, %r15
    mov $COUNTER_LIVE, %edi
    xor %ecx, %ecx
1:  mov (%rdi,%rcx,8), %rax
    add %r9, %r10
    mov %r10, %rdx
    cmp $13, %ecx
    jb 2f
    cmp $21, %ecx
    jae 2f
    and counter_mask(%rip), %rdx
2:  cmp %rdx, %rax
    jne counter_broken_register
counter_fold_registers_next:
    rol $5, %r15
    xor %rax, %r15
    imul %r8, %r15
    inc %ecx
    cmp $COUNTER_LIVE_WORDS, %ecx
    jb 1b
    ret

# Folds the next line of the window into the hash and writes it anew from the hash. In the first lap the
# line counts as zeros, whatever the memory held.
counter_fold_line:
    mov counter_page(%rip), %rax
    mov counter_line(%rip), %rbp
    mov %rax, %rbx
    imul counter_stride(%rip), %rax
    add counter_window(%rip), %rax
    mov %rbp, %rdi
    shl $9, %rdi
    add %rax, %rdi                      # rdi = the line
    lea (%rbp,%rbx,8), %rsi
    shl $3, %rsi
    add $FREE, %rsi                     # rsi = its word in the shadow
    mov counter_multiplier(%rip), %r8
    mov counter_step(%rip), %r9
    mov (%rsi), %r10                    # what the line began with when it was written
    xor %ecx, %ecx
    cmp counter_lines(%rip), %r14
    ja 2f
1:  rol $5, %r15                        # first lap
    imul %r8, %r15
    inc %ecx
    cmp $64, %ecx
    jb 1b
    jmp 4f
2:  mov (%rdi,%rcx,8), %rax
    cmp %r10, %rax
    jne counter_broken_memory
counter_fold_line_next:
    rol $5, %r15
    xor %rax, %r15
    imul %r8, %r15
    add %r9, %r10
    inc %ecx
    cmp $64, %ecx
    jb 2b
4:  mov %r15, (%rsi)
    mov %r15, %rax
    xor %ecx, %ecx
5:  mov %rax, (%rdi,%rcx,8)
    add %r9, %rax
    inc %ecx
    cmp $64, %ecx
    jb 5b
    inc %rbx                            # next page; after the last one, the next line of the first
    cmp counter_pages(%rip), %rbx
    jb 6f
    xor %ebx, %ebx
    inc %ebp
    and $7, %ebp
6:  mov %rbx, counter_page(%rip)
    mov %rbp, counter_line(%rip)
    ret

# With verify=1 a difference ends the machine with code 1; with verify=0 only the chain tells.
counter_broken_memory:
    cmpq $0, counter_verify(%rip)
    je counter_fold_line_next
    lea (%rdi,%rcx,8), %rax
    lea counter_text_memory(%rip), %rsi
    jmp counter_broken
counter_broken_register:
    cmpq $0, counter_verify(%rip)
    je counter_fold_registers_next
    mov %ecx, %eax
    lea counter_text_register(%rip), %rsi
    jmp counter_broken
counter_broken_number:
    mov counter_done(%rip), %rax
    lea counter_text_number(%rip), %rsi
counter_broken:
    cli
    push %rax
    push %rsi
    lea counter_text_broken(%rip), %rsi
    call counter_puts
    mov %r14, %rax
    call counter_put_decimal
    pop %rsi
    call counter_puts
    pop %rax
    call counter_put_hex
    call counter_newline
    mov $1, %al
    jmp counter_debug_exit

counter_timer:
    push %rax
    incq counter_interrupts(%rip)
    mov $0x20, %al
    out %al, $0x20
    pop %rax
    iretq

counter_spurious:
    iretq

counter_exception:
    jmp counter_fatal

    runtime counter
    fatal_exception counter
    exception_stubs counter
    plain_tss counter

    .balign 16
counter_idt:
    exception_gates counter
    idt_gate counter, counter_timer
  .rept 15
    idt_gate counter, counter_spurious
  .endr
counter_idt_end:

    .balign 8
counter_seed:       .quad 0x70657264757265      # "perdure"
counter_step:       .quad 0x9e3779b97f4a7c15
counter_multiplier: .quad 0x517cc1b727220a95
counter_mask:       .quad 0x7fffffffffff
counter_interrupts: .quad 0                     # by the interrupt handler
counter_done:       .quad 0                     # by the main loop; equals r14
counter_window:     .quad 0
counter_stride:     .quad 0
counter_pages:      .quad 0
counter_lines:      .quad 0
counter_page:       .quad 0
counter_line:       .quad 0
counter_parameters:
    parameter counter, ticks, 0
    parameter counter, hz, 100
    parameter counter, every, 1
    parameter counter, ram, 0x40000
    parameter counter, verify, 1
    parameters_end
    parameter_key counter, ticks
    parameter_key counter, hz
    parameter_key counter, every
    parameter_key counter, ram
    parameter_key counter, verify
counter_name:          .asciz "counter"
counter_text_tick:     .asciz "tick "
counter_text_done:     .asciz "done "
counter_text_no_room:  .asciz "ram= is less than a page or does not fit into the memory\n"
counter_text_broken:   .asciz "chain broken at tick "
counter_text_memory:   .asciz " memory "
counter_text_register: .asciz " register "
counter_text_number:   .asciz " number "

    guest_end counter
