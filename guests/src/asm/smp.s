# smp: processors take turns. Whose turn it is travels as an inter-processor interrupt: lost, it stops the round; doubled,
# it makes a turn out of order. What is printed is defined in `turns.rs`.
#
# A processor's registers: r12 its private hash, r13 turns it has taken, r14 its record, r15 the processors.

.set SMP_RECORDS,    SCRATCH            # 64 records of 64 bytes:
.set SMP_APIC_ID,    0
.set SMP_TOKENS,     8                  # interrupts received
.set SMP_LOG_TURN,   16                 # its last turn
.set SMP_LOG_HASH,   24                 # and the hash after it
.set SMP_INDEX,      32
.set SMP_MAX,        64
.set SMP_STACKS,     FREE               # a page each
.set SMP_LINES,      FREE + 0x40000     # a page each, of which 8 words are in the chain
.set SMP_TRAMPOLINE, 0x8000
.set SMP_VECTOR,     0x40

    guest_begin smp

smp_entry:
    cli
    cld
    mov $STACK, %esp
    mov %rsi, %rbx
    lea smp_name(%rip), %rsi
    call smp_puts
    own_machine smp
    mov %rbx, %rsi
    push %rbx
    call smp_linux_cmdline
    call smp_read_parameters
    pop %rbx
    mov $LAPIC, %edi
    mov 0x20(%rdi), %eax                # this processor first
    shr $24, %eax
    mov $1, %r15d
    call smp_clear_record
    cmpq $0, smp_cpus(%rip)
    jne 1f
    call smp_read_madt
    jmp 3f
1:  cmpq $SMP_MAX, smp_cpus(%rip)
    ja smp_too_many
    mov SMP_RECORDS + SMP_APIC_ID, %r8
    xor %ebx, %ebx
2:  cmp smp_cpus(%rip), %r15            # cpus=N: the local APICs 0 to N - 1
    jae 3f
    cmp %r8, %rbx
    je 4f
    mov %ebx, %eax
    inc %r15
    call smp_clear_record
4:  inc %ebx
    jmp 2b
3:  mov %r15, smp_count(%rip)
    lea smp_text_cpus(%rip), %rsi
    call smp_puts
    mov %r15, %rax
    call smp_put_decimal
    call smp_newline
    pic_through_lint0 0xfe
    mov smp_hz(%rip), %rcx
    mov $100, %eax
    test %rcx, %rcx
    cmovz %rax, %rcx
    pit_periodic
    mov $SMP_RECORDS, %r14d
    call smp_own_record
    call smp_start_others
    cmpq $0, smp_hz(%rip)
    jne 5f
    out8 0x21, 0xff                     # free running: no timer any more
5:  mov %r14, %rdi
    call smp_pass_token                 # the first turn is ours
    jmp smp_turns_begin

smp_too_many:
    lea smp_text_too_many(%rip), %rsi
    call smp_puts
    mov $2, %al
    jmp smp_debug_exit

# Makes record r15 - 1 that of the APIC eax. Clobbers rdi, rax.
smp_clear_record:
    lea -1(%r15), %rdi
    shl $6, %rdi
    mov %rax, SMP_RECORDS + SMP_APIC_ID(%rdi)
    movq $0, SMP_RECORDS + SMP_TOKENS(%rdi)
    movq $0, SMP_RECORDS + SMP_LOG_TURN(%rdi)
    lea -1(%r15), %rax
    mov %rax, SMP_RECORDS + SMP_INDEX(%rdi)
    ret

# The enabled processors of the MADT, by way of boot_params (rbx), RSDP and XSDT; without these there is but one.
# Tables beyond the first GiB are not mapped and count as absent. Adds to r15.
smp_read_madt:
    mov 0x70(%rbx), %rsi
    call smp_within_first_gib
    jc 9f
    cmpb $2, 15(%rsi)                   # revision: there is an XSDT
    jb 9f
    mov 24(%rsi), %rsi
    call smp_within_first_gib
    jc 9f
    mov 4(%rsi), %ebp
    cmp $4096, %ebp
    ja 9f
    lea (%rsi,%rbp), %rbp
    lea 36(%rsi), %rbx
1:  lea 8(%rbx), %rax
    cmp %rbp, %rax
    ja 9f
    mov (%rbx), %rsi
    mov %rax, %rbx
    call smp_within_first_gib
    jc 1b
    cmpl $0x43495041, (%rsi)            # "APIC"
    jne 1b
    mov 4(%rsi), %ebp
    cmp $4096, %ebp
    ja 9f
    lea (%rsi,%rbp), %rbp
    lea 44(%rsi), %rbx
    mov SMP_RECORDS + SMP_APIC_ID, %r8
2:  lea 2(%rbx), %rax
    cmp %rbp, %rax
    ja 9f
    cmpb $0, (%rbx)                     # a local APIC
    jne 3f
    testb $1, 4(%rbx)                   # enabled
    jz 3f
    movzbl 3(%rbx), %eax
    cmp %r8, %rax
    je 3f
    cmp $SMP_MAX, %r15
    jae smp_too_many
    inc %r15
    call smp_clear_record
3:  movzbl 1(%rbx), %eax
    test %eax, %eax
    jz 9f
    add %rax, %rbx
    jmp 2b
9:  ret

# Carry when rsi is null or beyond what is mapped.
smp_within_first_gib:
    test %rsi, %rsi
    jz 1f
    cmp $0x3fff0000, %rsi
    ja 1f
    clc
    ret
1:  stc
    ret

# INIT, SIPI, SIPI to each of the others; gives up on one that is not there after two hundred ticks.
smp_start_others:
    lea smp_trampoline(%rip), %rsi
    mov $SMP_TRAMPOLINE, %edi
    mov $(smp_trampoline_end - smp_trampoline), %ecx
    rep movsb
    mov $1, %ebx
1:  cmp %r15, %rbx
    jae 9f
    mov %rbx, %rbp
    shl $6, %rbp
    add $SMP_RECORDS, %rbp
    mov $0x4500, %eax                   # INIT
    call smp_send
    mov $2, %ecx
    call smp_sleep
    mov $(0x4600 | SMP_TRAMPOLINE >> 12), %eax
    call smp_send
    mov $(0x4600 | SMP_TRAMPOLINE >> 12), %eax
    call smp_send
    mov $200, %r8d
2:  cmp %rbx, smp_online(%rip)
    jae 3f
    mov $1, %ecx
    call smp_sleep
    dec %r8d
    jnz 2b
    lea smp_text_absent(%rip), %rsi
    call smp_puts
    mov %rbx, %rax
    call smp_put_decimal
    call smp_newline
    mov $2, %al
    jmp smp_debug_exit
3:  inc %rbx
    jmp 1b
9:  ret

# Sends interrupt command eax to the processor of record rbp. Clobbers rdi, rdx.
smp_send:
    mov $LAPIC, %edi
    mov SMP_APIC_ID(%rbp), %edx
    shl $24, %edx
    mov %edx, 0x310(%rdi)
    mov %eax, 0x300(%rdi)
1:  testl $0x1000, 0x300(%rdi)
    jnz 1b
    ret

# Waits for ecx timer ticks.
smp_sleep:
    mov smp_ticks(%rip), %rdx
    add %rdx, %rcx
1:  cli
    cmp %rcx, smp_ticks(%rip)
    jae 2f
    sti
    hlt
    jmp 1b
2:  ret

# Every processor: GS is its record.
smp_own_record:
    mov %r14, %rax
    mov %r14, %rdx
    shr $32, %rdx
    mov $0xc0000101, %ecx
    wrmsr
    ret

# Where the others come to in long mode, all with the stack of none.
smp_other:
    lidt smp_idt_pointer(%rip)
    mov $LAPIC, %edi
    movl $0x1ff, 0xf0(%rdi)
    mov 0x20(%rdi), %eax
    shr $24, %eax
    mov smp_count(%rip), %r15
    mov $SMP_RECORDS, %r14d
1:  cmp %rax, SMP_APIC_ID(%r14)
    je 2f
    add $64, %r14
    jmp 1b
2:  mov SMP_INDEX(%r14), %rsp
    inc %rsp
    shl $12, %rsp
    add $SMP_STACKS, %rsp
    call smp_own_record
    mov SMP_INDEX(%r14), %rax           # in order, so that this counts them as well
    mov %rax, smp_online(%rip)

smp_turns_begin:
    xor %r13d, %r13d
    mov smp_seed(%rip), %r12

# Registers that are not in use get private hash + k * STEP; then to wait for the token.
smp_wait:
    mov %r12, %rax
  .irp r, rbx,rbp,r8,r9,r10,r11
    add smp_step(%rip), %rax
    mov %rax, %\r
  .endr
1:  cli
    cmp %r13, SMP_TOKENS(%r14)
    jne 2f
    sti
    hlt
    jmp 1b
2:  sti
    inc %r13
    mov smp_multiplier(%rip), %rdi
  .macro smp_fold from, into
    rol $5, \into
    xor \from, \into
    imul %rdi, \into
  .endm
  .irp r, rbx,rbp,r8,r9,r10,r11
    smp_fold %\r, %r12
  .endr
    mov smp_turn(%rip), %rbx            # turns taken so far: by whom must the next one be?
    mov %rbx, %rax
    xor %edx, %edx
    div %r15
    cmp SMP_INDEX(%r14), %rdx
    jne smp_broken
    inc %rax
    cmp %r13, %rax
    jne smp_broken
    test %rdx, %rdx
    jnz 3f
    call smp_first_of_round
3:  mov smp_multiplier(%rip), %rdi
    mov smp_hash(%rip), %rbp
    smp_fold %rbp, %r12
    mov SMP_INDEX(%r14), %rsi           # its line of memory, zeros at first
    shl $12, %rsi
    add $SMP_LINES, %rsi
    xor %ecx, %ecx
4:  xor %eax, %eax
    cmp $1, %r13
    je 5f
    mov (%rsi,%rcx,8), %rax
5:  smp_fold %rax, %r12
    inc %ecx
    cmp $8, %ecx
    jb 4b
    mov %r12, %rax
    xor %ecx, %ecx
6:  mov %rax, (%rsi,%rcx,8)
    add smp_step(%rip), %rax
    inc %ecx
    cmp $8, %ecx
    jb 6b
    inc %rbx
    smp_fold %rbx, %rbp
    mov SMP_INDEX(%r14), %rax
    smp_fold %rax, %rbp
    smp_fold %r12, %rbp
    mov %rbx, SMP_LOG_TURN(%r14)
    mov %rbp, SMP_LOG_HASH(%r14)
    mov %rbp, smp_hash(%rip)
    mov %rbx, smp_turn(%rip)
    mov SMP_INDEX(%r14), %rdi           # on to the next
    inc %rdi
    xor %eax, %eax
    cmp %r15, %rdi
    cmove %rax, %rdi
    shl $6, %rdi
    add $SMP_RECORDS, %rdi
    call smp_pass_token
    jmp smp_wait

# Sends the token to the processor of record rdi.
smp_pass_token:
    push %rbp
    mov %rdi, %rbp
    mov $SMP_VECTOR, %eax
    call smp_send
    pop %rbp
    ret

# The first processor, before its turn: waits for the timer, then prints the round that is over.
smp_first_of_round:
    cmpq $0, smp_hz(%rip)
    je 1f
    mov $1, %ecx
    call smp_sleep
    sti
1:  cmp $1, %r13
    je 9f
    push %rbx
    mov $SMP_RECORDS, %ebp
    mov %r15, %rbx
2:  lea smp_text_turn(%rip), %rsi
    call smp_puts
    mov SMP_LOG_TURN(%rbp), %rax
    call smp_put_decimal
    lea smp_text_cpu(%rip), %rsi
    call smp_puts
    mov SMP_INDEX(%rbp), %rax
    call smp_put_decimal
    mov $32, %al
    call smp_putc
    mov SMP_LOG_HASH(%rbp), %rax
    call smp_put_hex
    call smp_newline
    add $64, %rbp
    dec %rbx
    jnz 2b
    pop %rbx
    mov smp_turns(%rip), %rax
    test %rax, %rax
    jz 9f
    cmp %rax, %rbx
    jae smp_done
9:  ret

smp_done:
    lea smp_text_done(%rip), %rsi
    call smp_puts
    mov %rbx, %rax
    call smp_put_decimal
    mov $32, %al
    call smp_putc
    mov smp_hash(%rip), %rax
    call smp_put_hex
    call smp_newline
    jmp smp_power_off

# The token came out of turn. rbx = turns taken.
smp_broken:
    cli
    lea smp_text_broken(%rip), %rsi
    call smp_puts
    lea 1(%rbx), %rax
    call smp_put_decimal
    lea smp_text_cpu(%rip), %rsi
    call smp_puts
    mov SMP_INDEX(%r14), %rax
    call smp_put_decimal
    call smp_newline
    mov $1, %al
    jmp smp_debug_exit

smp_token:
    push %rdi
    incq %gs:SMP_TOKENS
    mov $LAPIC, %edi
    movl $0, 0xb0(%rdi)                 # EOI
    pop %rdi
    iretq

smp_timer:
    push %rax
    incq smp_ticks(%rip)
    mov $0x20, %al
    out %al, $0x20
    pop %rax
smp_spurious:
    iretq

smp_exception:
    jmp smp_fatal

# Copied to SMP_TRAMPOLINE, where SIPI starts the others in real mode.
    .code16
smp_trampoline:
    cli
    cld
    xor %ax, %ax
    mov %ax, %ds
    lgdtl SMP_TRAMPOLINE + (smp_trampoline_gdt - smp_trampoline)
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmpl $KERNEL_CODE32, $(smp_trampoline32 - smp_trampoline + SMP_TRAMPOLINE)
    .code32
smp_trampoline32:
    mov $KERNEL_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %cr4, %eax
    or $0x20, %eax                      # PAE
    mov %eax, %cr4
    mov $(smp_pml4 - smp_image + LOAD), %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx               # EFER.LME
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    and $0x9fffffff, %eax               # caches on: INIT leaves CD and NW set
    or $0x80000000, %eax
    mov %eax, %cr0
    ljmpl $KERNEL_CODE, $(smp_other - smp_image + LOAD)
    .code64
    .balign 8
smp_trampoline_gdt:
    .word smp_gdt_end - smp_gdt - 1
    .long smp_gdt - smp_image + LOAD
smp_trampoline_end:

    runtime smp
    fatal_exception smp
    exception_stubs smp
    plain_tss smp
    .balign 16
smp_idt:
    exception_gates smp
    idt_gate smp, smp_timer
  .rept 31
    idt_gate smp, smp_spurious
  .endr
    idt_gate smp, smp_token
smp_idt_end:

    .balign 8
smp_seed:       .quad 0x70657264757265
smp_step:       .quad 0x9e3779b97f4a7c15
smp_multiplier: .quad 0x517cc1b727220a95
smp_hash:       .quad 0x70657264757265
smp_turn:       .quad 0
smp_ticks:      .quad 0
smp_online:     .quad 0
smp_count:      .quad 0
smp_parameters:
    parameter smp, turns, 0
    parameter smp, hz, 100
    parameter smp, cpus, 0
    parameters_end
    parameter_key smp, turns
    parameter_key smp, hz
    parameter_key smp, cpus
smp_name:          .asciz "smp"
smp_text_cpus:     .asciz "cpus "
smp_text_turn:     .asciz "turn "
smp_text_cpu:      .asciz " cpu "
smp_text_done:     .asciz "done "
smp_text_absent:   .asciz "does not start: cpu "
smp_text_too_many: .asciz "more than 64 processors\n"
smp_text_broken:   .asciz "chain broken at turn "

    guest_end smp
