# probe: tries, one at a time, what this machine can run, and says so. Its output is defined in `probe.rs`.
#
# A test is announced before it is done, as one that KVM cannot run ends the machine (KVM_EXIT_INTERNAL_ERROR): the
# last test announced is the one. A test returns 0 in eax, or why it failed: an exception's vector + 1, or PROBE_*.
# Tests may clobber all registers but rbx, which walks through the table of tests.

.set PROBE_ABSENT,     0x200            # CPUID does not offer it
.set PROBE_WRONG,      0x201            # it was done, with a wrong result
.set PROBE_TIMEOUT,    0x202            # CPL3 did not come back in time
.set PROBE_USER_STACK, SCRATCH + 0x8000
.set PROBE_TRAP_STACK, SCRATCH + 0x4000 # of traps from CPL3: the stack of the tests stays as it is
.set PROBE_DATA,       SCRATCH          # memory for tests, 4 KiB
.set PROBE_IOPL,       0x3000

    guest_begin probe

probe_entry:
    cli
    cld
    mov $STACK, %esp
    mov %rsi, %r12
    lea probe_name(%rip), %rsi
    call probe_puts
    own_machine probe
    mov %cr4, %rax
    or $0x600, %eax
    mov %rax, %cr4
    mov %cr0, %rax
    and $~0x0c, %eax
    or $2, %eax
    mov %rax, %cr0
    mov %r12, %rsi
    call probe_linux_cmdline
    call probe_read_parameters
    pic_through_lint0 0xfe
    out8 0x43, 0x34                     # 100 Hz
    out8 0x40, (1193182 / 100) & 0xff
    out8 0x40, (1193182 / 100) >> 8

    lea probe_tests(%rip), %rbx
probe_next:
    mov (%rbx), %rsi
    test %rsi, %rsi
    jz probe_finish
    lea probe_key_only(%rip), %rsi
    call probe_find_word
    test %rax, %rax
    jz 1f
    call probe_listed
    jnz 9f
1:  lea probe_key_skip(%rip), %rsi
    call probe_find_word
    test %rax, %rax
    jz 2f
    call probe_listed
    jz 9f
2:  lea probe_text_test(%rip), %rsi
    call probe_puts
    mov (%rbx), %rsi
    call probe_puts
    call probe_newline
    movq $0, probe_instructions(%rip)
    movq $0, probe_expected(%rip)
    call *8(%rbx)
    cli
    movq $0, probe_expected(%rip)
    test %eax, %eax
    jnz 3f
    lea probe_text_ok(%rip), %rsi
    call probe_puts
    mov (%rbx), %rsi
    call probe_puts
    incq probe_passed(%rip)
    cmpq $0, probe_instructions(%rip)
    je 8f
    lea probe_text_instructions(%rip), %rsi
    call probe_puts
    mov probe_instructions(%rip), %rax
    call probe_put_decimal
    lea probe_text_cycles(%rip), %rsi
    call probe_puts
    mov probe_cycles(%rip), %rax
    call probe_put_decimal
    jmp 8f
3:  push %rax
    lea probe_text_no(%rip), %rsi
    call probe_puts
    mov (%rbx), %rsi
    call probe_puts
    pop %rax
    cmp $PROBE_ABSENT, %eax
    lea probe_text_absent(%rip), %rsi
    je 4f
    cmp $PROBE_WRONG, %eax
    lea probe_text_wrong(%rip), %rsi
    je 4f
    cmp $PROBE_TIMEOUT, %eax
    lea probe_text_timeout(%rip), %rsi
    je 4f
    lea -1(%rax), %eax
    push %rax
    lea probe_text_exception(%rip), %rsi
    call probe_puts
    pop %rax
    call probe_put_decimal
    jmp 8f
4:  call probe_puts
8:  call probe_newline
9:  add $16, %rbx
    jmp probe_next

probe_finish:
    mov probe_passed(%rip), %rax
    call probe_report
    lea probe_text_done(%rip), %rsi
    call probe_puts
    mov probe_passed(%rip), %rax
    call probe_put_decimal
    call probe_newline
    jmp probe_power_off

# Whether the test at rbx is in the list "a,b,c" at rax: ZF. Clobbers rax, rcx, rdx, rsi.
probe_listed:
1:  mov (%rbx), %rsi
    xor %ecx, %ecx
2:  mov (%rsi,%rcx), %dl
    test %dl, %dl
    jz 4f
    cmp %dl, (%rax,%rcx)
    jne 5f
    inc %ecx
    jmp 2b
4:  mov (%rax,%rcx), %dl                # the name ends: so must the word
    cmp $0x2c, %dl
    je 9f
    cmp $32, %dl
    je 9f
    test %dl, %dl
    jz 9f
5:  mov (%rax), %dl                     # to the next word
    test %dl, %dl
    jz 8f
    cmp $32, %dl
    je 8f
    inc %rax
    cmp $0x2c, %dl
    je 1b
    jmp 5b
8:  or $1, %edx                         # not in the list
9:  ret

# An exception that a test expects ends the test there; others end the probe. The stack: vector, error code, RIP, CS.
probe_exception:
    cmpq $0, probe_expected(%rip)
    je probe_fatal
    mov (%rsp), %rax
probe_return:                           # eax = vector
    mov 24(%rsp), %rcx
    and $3, %ecx
    mov %rcx, probe_from(%rip)
    mov 16(%rsp), %rcx
    mov %rcx, probe_at(%rip)
    mov probe_rsp(%rip), %rsp
    mov probe_expected(%rip), %rcx
    movq $0, probe_expected(%rip)
    jmp *%rcx

# Timer: counts; CPL3 that does not come back within half a second is given up.
probe_timer:
    push %rax
    mov $0x20, %al
    out %al, $0x20
    incq probe_ticks(%rip)
    testb $3, 16(%rsp)
    jz 1f
    cmpq $50, probe_ticks(%rip)
    ja 2f
1:  pop %rax
    iretq
2:  mov $PROBE_TIMEOUT - 1, %eax
    sub $8, %rsp                        # as if by an exception: two words below RIP
    jmp probe_return

# Software interrupt 0x30, open to CPL3.
probe_software:
    push $0
    push $0x30
    mov $0x30, %eax
    cmpq $0, probe_expected(%rip)
    jne probe_return
    movq $1, probe_software_came(%rip)
    add $16, %rsp
    iretq

probe_spurious:
    iretq

# Runs CPL3 code at rdi, with rsi more in RFLAGS and interrupts on, until an exception; its vector in eax.
probe_user:
    pop %rax
    mov %rax, probe_expected(%rip)
    mov %rsp, probe_rsp(%rip)
    movq $0, probe_ticks(%rip)
    or $0x202, %rsi
    push $USER_DATA
    push $PROBE_USER_STACK
    push %rsi
    push $USER_CODE
    push %rdi
    iretq

# What follows may raise an exception: the test then goes on at `label`, its vector in eax.
.macro attempt label
    mov %rsp, probe_rsp(%rip)
    lea \label(%rip), %rax
    mov %rax, probe_expected(%rip)
.endm

# A test of one CPL0 instruction sequence, which fails with the exception that it raises.
.macro privileged_test name, instructions:vararg
probe_test_\name:
    attempt probe_raised
    \instructions
    xor %eax, %eax
    ret
.endm

probe_raised:
    inc %eax
    ret

# A test of a CPL3 sequence which comes back by `ud2` right behind it.
.macro user_test name, flags, instructions:vararg
probe_test_\name:
    lea 1f(%rip), %rdi
    mov $\flags, %esi
    call probe_user
    lea 2f(%rip), %rcx
    jmp probe_user_result
1:  \instructions
2:  ud2
.endm

# eax = vector, rcx = where the ud2 was due.
probe_user_result:
    cmp $6, %eax
    jne probe_raised
    cmp %rcx, probe_at(%rip)
    jne probe_raised
    cmpq $3, probe_from(%rip)
    jne probe_wrong
    xor %eax, %eax
    ret
probe_wrong:
    mov $PROBE_WRONG, %eax
    ret
probe_absent:
    mov $PROBE_ABSENT, %eax
    ret

# CPUID leaf 1, ECX and EDX.
.macro needs_ecx bit
    mov $1, %eax
    push %rbx
    cpuid
    pop %rbx
    bt $\bit, %ecx
    jnc probe_absent
.endm

    privileged_test cpuid, xor %eax, %eax; push %rbx; cpuid; pop %rbx
    privileged_test tsc, rdtsc
    privileged_test msr, mov $0xc0000080, %ecx; rdmsr; wrmsr
    privileged_test sse_move, mov $PROBE_DATA, %edi; movdqu (%rdi), %xmm0; movdqu %xmm0, (%rdi)
    privileged_test sse, pxor %xmm1, %xmm1; paddd %xmm1, %xmm0
    privileged_test x87, fninit; fld1; fstp %st(0)
    privileged_test fxsave, mov $PROBE_DATA, %edi; fxsave64 (%rdi); fxrstor64 (%rdi)
    privileged_test string, mov $PROBE_DATA, %esi; mov $PROBE_DATA + 1024, %edi; mov $512, %ecx; rep movsb
    privileged_test hypercall, mov $1, %eax; vmcall
    privileged_test lapic, mov $LAPIC, %edi; mov 0x30(%rdi), %eax
    privileged_test pause, pause

# Speed: 2 instructions a turn.
probe_test_cpl0:
    attempt probe_raised
    rdtsc
    mov %eax, %esi
    mov %edx, %edi
    mov $10000, %ecx
1:  dec %ecx
    jnz 1b
    rdtsc
    movq $20000, probe_instructions(%rip)
probe_elapsed:                          # from edi:esi to edx:eax
    shl $32, %rdx
    or %rdx, %rax
    shl $32, %rdi
    or %rdi, %rsi
    sub %rsi, %rax
    mov %rax, probe_cycles(%rip)
    xor %eax, %eax
    ret

probe_test_interrupt:
    attempt probe_raised
    movq $0, probe_ticks(%rip)
1:  sti
    hlt
    cli
    cmpq $2, probe_ticks(%rip)
    jb 1b
    xor %eax, %eax
    ret

# INT returns here, as nothing is expected while its handler runs.
probe_test_int:
    movq $0, probe_software_came(%rip)
    int $0x30
    cmpq $1, probe_software_came(%rip)
    jne probe_wrong
    xor %eax, %eax
    ret

probe_test_xgetbv:
    needs_ecx 26
    attempt probe_raised
    mov %cr4, %rax
    or $0x40000, %eax                   # OSXSAVE
    mov %rax, %cr4
    xor %ecx, %ecx
    xgetbv
    xor %eax, %eax
    ret

probe_test_xsetbv:
    needs_ecx 26
    attempt probe_raised
    mov %cr4, %rax
    or $0x40000, %eax
    mov %rax, %cr4
    xor %ecx, %ecx
    xor %edx, %edx
    mov $3, %eax                        # x87, SSE
    xsetbv
    xor %eax, %eax
    ret

probe_test_popcnt:
    needs_ecx 23
    attempt probe_raised
    popcnt %rax, %rax
    xor %eax, %eax
    ret

probe_test_cmpxchg16b:
    needs_ecx 13
    attempt probe_raised
    push %rbx
    mov $PROBE_DATA, %edi
    lock cmpxchg16b (%rdi)
    pop %rbx
    xor %eax, %eax
    ret

# kvmclock: the new system time MSR, if KVM's own CPUID leaf offers it.
probe_test_kvmclock:
    push %rbx
    mov $0x40000000, %eax
    cpuid
    mov %ebx, %esi
    xor %eax, %eax
    cmp $0x4b4d564b, %esi               # "KVMK"
    jne 1f
    mov $0x40000001, %eax
    cpuid
1:  pop %rbx
    test $8, %eax
    jz probe_absent
    attempt probe_raised
    movq $0, PROBE_DATA + 24
    mov $(PROBE_DATA | 1), %eax
    xor %edx, %edx
    mov $0x4b564d01, %ecx
    wrmsr
    mov PROBE_DATA + 24, %edi           # tsc_to_system_mul, once KVM has filled it
    xor %eax, %eax
    xor %edx, %edx
    wrmsr
    test %edi, %edi
    jz probe_wrong
    xor %eax, %eax
    ret

    user_test cpl3, 0, nop
    user_test cpl3_sse, 0, pxor %xmm1, %xmm1; paddd %xmm1, %xmm0
    user_test cpl3_iopl, PROBE_IOPL, mov $(SERIAL + 3), %edx; in %dx, %al
    user_test cpl3_bitmap, 0, mov $(SERIAL + 5), %edx; in %dx, %al

probe_test_cpl3_xgetbv:
    needs_ecx 26
    mov %cr4, %rax
    or $0x40000, %eax
    mov %rax, %cr4
    lea 1f(%rip), %rdi
    xor %esi, %esi
    call probe_user
    lea 2f(%rip), %rcx
    jmp probe_user_result
1:  xor %ecx, %ecx
    xgetbv
2:  ud2

# A page fault from CPL3: 4 GiB is not mapped.
probe_test_cpl3_fault:
    lea 1f(%rip), %rdi
    xor %esi, %esi
    call probe_user
    cmp $14, %eax
    jne probe_raised
    mov %cr2, %rax
    mov $1, %ecx
    shl $32, %rcx
    cmp %rcx, %rax
    jne probe_wrong
    xor %eax, %eax
    ret
1:  mov $1, %eax
    shl $32, %rax
    mov (%rax), %rax
    ud2

probe_test_cpl3_speed:
    lea 1f(%rip), %rdi
    xor %esi, %esi
    call probe_user
    cmp $6, %eax
    jne probe_raised
    movq $400000, probe_instructions(%rip)
    mov %r8d, %esi
    mov %r9d, %edi
    mov %r10d, %eax
    mov %r11d, %edx
    jmp probe_elapsed
1:  rdtsc
    mov %eax, %r8d
    mov %edx, %r9d
    mov $200000, %ecx
2:  dec %ecx
    jnz 2b
    rdtsc
    mov %eax, %r10d
    mov %edx, %r11d
    ud2

# The timer must interrupt CPL3 and return to it.
probe_test_cpl3_interrupt:
    lea 1f(%rip), %rdi
    xor %esi, %esi
    call probe_user
    lea 2f(%rip), %rcx
    jmp probe_user_result
1:  cmpq $2, probe_ticks(%rip)
    jb 1b
2:  ud2

probe_test_cpl3_int:
    lea 1f(%rip), %rdi
    xor %esi, %esi
    call probe_user
    cmp $0x30, %eax
    jne probe_raised
    xor %eax, %eax
    ret
1:  int $0x30
    ud2

# SYSCALL comes to CPL0 code at `target`, which leaves by an exception: there are KVMs where CPL0 that was entered by
# SYSCALL may neither do port I/O nor IRETQ.
.macro syscall_test name, instructions:vararg
probe_test_\name:
    mov $0xc0000080, %ecx               # EFER.SCE
    rdmsr
    or $1, %eax
    wrmsr
    mov $0xc0000081, %ecx               # STAR: CS 0x08 at entry, 0x10 | 3 below CPL3's
    xor %eax, %eax
    mov $0x00130008, %edx
    wrmsr
    mov $0xc0000082, %ecx               # LSTAR
    mov $(3f - probe_image + LOAD), %eax
    xor %edx, %edx
    wrmsr
    mov $0xc0000084, %ecx               # FMASK: interrupts off
    mov $0x200, %eax
    xor %edx, %edx
    wrmsr
    lea 2f(%rip), %rdi
    xor %esi, %esi
    call probe_user
    lea 4f(%rip), %rcx
    cmp $6, %eax
    jne probe_raised
    cmp %rcx, probe_at(%rip)
    jne probe_raised
    xor %eax, %eax
    ret
2:  syscall
    ud2
3:  \instructions
4:  ud2
.endm

    syscall_test syscall, nop
    syscall_test syscall_port, mov $(SERIAL + 5), %edx; in %dx, %al

    runtime probe
    fatal_exception probe
    exception_stubs probe

    .balign 16
probe_tss:                              # its bitmap opens port SERIAL + 5 to CPL3, and no other
    .long 0
    .quad PROBE_TRAP_STACK
    .fill 90, 1, 0
    .word 104
    .fill (SERIAL + 5) / 8, 1, 0xff
    .byte 0xff & ~(1 << ((SERIAL + 5) % 8))
    .byte 0xff
probe_tss_end:

    .balign 16
probe_idt:
    exception_gates probe
    idt_gate probe, probe_timer
  .rept 15
    idt_gate probe, probe_spurious
  .endr
    .word probe_software - probe_image, KERNEL_CODE, 0xee00, LOAD >> 16   # DPL 3
    .quad 0
probe_idt_end:

    .balign 8
probe_expected:      .quad 0            # where a test goes on after an exception; 0 if it expects none
probe_rsp:           .quad 0            # and with which stack
probe_from:          .quad 0            # CPL of the last exception
probe_at:            .quad 0            # and its RIP
probe_ticks:         .quad 0
probe_software_came: .quad 0
probe_instructions:  .quad 0
probe_cycles:        .quad 0
probe_passed:        .quad 0
probe_parameters:
    parameters_end

.macro test_row name
    .quad probe_name_\name - probe_image + LOAD, probe_test_\name - probe_image + LOAD
.endm
.macro test_name name
probe_name_\name: .asciz "\name"
.endm
probe_tests:
  .irp t, cpuid, tsc, msr, cpl0, lapic, interrupt, string, pause, popcnt, cmpxchg16b, kvmclock, cpl3, cpl3_fault, cpl3_speed, cpl3_interrupt, cpl3_sse, cpl3_bitmap, sse_move, xsetbv, int, xgetbv, sse, x87, fxsave, hypercall, syscall, syscall_port, cpl3_xgetbv, cpl3_iopl, cpl3_int
    test_row \t
  .endr
    .quad 0
  .irp t, cpuid, tsc, msr, cpl0, lapic, interrupt, string, pause, popcnt, cmpxchg16b, kvmclock, cpl3, cpl3_fault, cpl3_speed, cpl3_interrupt, cpl3_sse, cpl3_bitmap, sse_move, xsetbv, int, xgetbv, sse, x87, fxsave, hypercall, syscall, syscall_port, cpl3_xgetbv, cpl3_iopl, cpl3_int
    test_name \t
  .endr
probe_key_only:          .asciz "only="
probe_key_skip:          .asciz "skip="
probe_name:              .asciz "probe"
probe_text_test:         .asciz "test "
probe_text_ok:           .asciz "ok "
probe_text_no:           .asciz "no "
probe_text_absent:       .asciz " absent"
probe_text_wrong:        .asciz " wrong"
probe_text_timeout:      .asciz " timeout"
probe_text_exception:    .asciz " exception "
probe_text_instructions: .asciz " instructions="
probe_text_cycles:       .asciz " cycles="
probe_text_done:         .asciz "done "

    guest_end probe, 4
