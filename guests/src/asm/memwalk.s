# memwalk: touches a working set page by page, in a given pattern, and says how far it is through the report port.
# What it does is defined in `walk.rs`; the two must agree to the bit.
#
# The walk runs at CPL3, so that it is quick also where CPL0 code is emulated. CPL3 asks CPL0 for a service by `ud2`
# with its number in eax: neither INT nor SYSCALL works on every KVM, an exception does.
#
# Registers of the walk: r12 hash of touches, r13 pages, r14 touches done, r15 state of the generator,
# rbx touches left to the next report, rbp writes.

.set WALK_USER_STACK, SCRATCH + 0x8000
.set WALK_EXTENTS,    SCRATCH           # (pages, address) of each stretch of memory; the last has pages = 2^64 - 1

    guest_begin memwalk

memwalk_entry:
    cli
    cld
    mov $STACK, %esp
    mov %rsi, %r12
    lea memwalk_name(%rip), %rsi
    call memwalk_puts
    own_machine memwalk
    mov %r12, %rsi
    call memwalk_linux_cmdline
    call memwalk_read_parameters
    call memwalk_lay_out
    lea memwalk_text_pages(%rip), %rsi
    call memwalk_puts
    mov memwalk_pages(%rip), %rax
    call memwalk_put_decimal
    call memwalk_newline
    push $USER_DATA
    push $WALK_USER_STACK
    push $2
    push $USER_CODE
    lea walk_start(%rip), %rax
    push %rax
    iretq

# Finds the stretches of usable memory and what of them is the working set. r12 = boot_params.
# From FREE on: page directories for all memory above the first GiB, the versions (verify=1), then pages.
memwalk_lay_out:
    movzbl 0x1e8(%r12), %ecx
    lea 0x2d0(%r12), %rsi
    mov $WALK_EXTENTS, %edi
    xor %r8d, %r8d                      # pages in all
    xor %r9d, %r9d                      # end of memory
    movb $0, memwalk_found(%rip)
1:  test %ecx, %ecx
    jz 5f
    cmpl $1, 16(%rsi)
    jne 4f
    mov (%rsi), %rax
    mov 8(%rsi), %rdx
    add %rax, %rdx                      # a usable stretch from rax to rdx
    mov $512 << 30, %r10                # what one page directory pointer table maps
    cmp %r10, %rdx
    cmova %r10, %rdx
    add $4095, %rax
    and $-4096, %rax
    and $-4096, %rdx
    mov $FREE, %r10d
    cmp %r10, %rdx
    jbe 4f
    cmp %r10, %rax
    ja 2f
    mov %r10, %rax
    movb $1, memwalk_found(%rip)
2:  cmp %rdx, %rax
    jae 4f
    cmp %r9, %rdx
    cmova %rdx, %r9
    sub %rax, %rdx
    shr $12, %rdx
    mov %rdx, (%rdi)
    mov %rax, 8(%rdi)
    add %rdx, %r8
    add $16, %rdi
4:  add $20, %rsi
    dec %ecx
    jmp 1b
5:  movq $-1, (%rdi)
    movq $0, 8(%rdi)
    cmpb $0, memwalk_found(%rip)
    je memwalk_no_room
    add $0x3fffffff, %r9
    shr $30, %r9
    mov %r9, memwalk_gibs(%rip)
    mov memwalk_ws(%rip), %r13
    shr $12, %r13
    mov %r13, %rax
    test %rax, %rax
    cmovz %r8, %rax                     # ws=0: all there is
    lea -1(%r9), %rdx                   # pages for directories
    mov %rdx, %r10
    shl $12, %r10
    add $FREE, %r10
    mov %r10, memwalk_versions(%rip)
    cmpq $0, memwalk_verify(%rip)
    je 6f
    lea 1023(%rax), %rax                # 4 bytes a page
    shr $10, %rax
    mov %rax, memwalk_version_pages(%rip)
    add %rax, %rdx
6:  mov $WALK_EXTENTS, %edi             # these come from the stretch that holds FREE
7:  cmpq $FREE, 8(%rdi)
    je 8f
    add $16, %rdi
    jmp 7b
8:  cmp %rdx, (%rdi)
    jbe memwalk_no_room
    sub %rdx, (%rdi)
    sub %rdx, %r8
    shl $12, %rdx
    add %rdx, 8(%rdi)
    test %r13, %r13
    cmovz %r8, %r13
    cmp %r8, %r13
    ja memwalk_no_room
    test %r13, %r13
    jz memwalk_no_room
    mov %r13, memwalk_pages(%rip)
    ret
memwalk_no_room:
    lea memwalk_text_no_room(%rip), %rsi
    call memwalk_puts
    mov $2, %al
    jmp memwalk_debug_exit

# Services. The stack: vector, error code, RIP, CS, RFLAGS, RSP, SS.
memwalk_exception:
    cmpq $6, (%rsp)
    jne memwalk_fatal
    testb $3, 24(%rsp)
    jz memwalk_fatal
    addq $2, 16(%rsp)                   # behind the ud2
    cmp $1, %eax
    je memwalk_service_done
    ja memwalk_service_broken
    mov %r14, %rax                      # 0: report
    call memwalk_report
    add $16, %rsp
    iretq

memwalk_service_done:
    mov %r14, %rax
    call memwalk_report
    lea memwalk_text_done(%rip), %rsi
    call memwalk_puts
    mov %r14, %rax
    call memwalk_put_decimal
    mov $32, %al
    call memwalk_putc
    mov %rbp, %rax
    call memwalk_put_decimal
    mov $32, %al
    call memwalk_putc
    mov %r12, %rax
    call memwalk_put_hex
    call memwalk_newline
    cmpq $0, memwalk_idle(%rip)
    je memwalk_power_off
1:  hlt
    jmp 1b

memwalk_service_broken:                 # rdi = address, rsi = page
    push %rdi
    push %rsi
    lea memwalk_text_broken(%rip), %rsi
    call memwalk_puts
    mov %r14, %rax
    call memwalk_put_decimal
    lea memwalk_text_page(%rip), %rsi
    call memwalk_puts
    pop %rax
    call memwalk_put_decimal
    lea memwalk_text_address(%rip), %rsi
    call memwalk_puts
    pop %rax
    call memwalk_put_hex
    call memwalk_newline
    mov $1, %al
    jmp memwalk_debug_exit

# ---- From here on CPL3. ----

walk_start:
    mov $FREE, %edi                     # map what lies beyond the first GiB, in pages of 2 MiB
    mov $1, %r8d
1:  cmp memwalk_gibs(%rip), %r8
    jae 3f
    lea memwalk_pdpt(%rip), %rsi
    lea 7(%rdi), %rax
    mov %rax, (%rsi,%r8,8)
    mov %r8, %rax
    shl $30, %rax
    or $0x87, %rax
    mov $512, %ecx
2:  mov %rax, (%rdi)
    add $0x200000, %rax
    add $8, %rdi
    dec %ecx
    jnz 2b
    inc %r8
    jmp 1b
3:  mov memwalk_versions(%rip), %rdi
    mov memwalk_version_pages(%rip), %rcx
    shl $9, %rcx
    xor %eax, %eax
    rep stosq
    mov memwalk_pages(%rip), %r13
    call walk_prepare
    xor %r14d, %r14d
    xor %ebp, %ebp
    mov memwalk_chain_seed(%rip), %r12
    mov memwalk_seed(%rip), %r15
    mov memwalk_report_every(%rip), %rbx

walk_next:
    cmp %r14, memwalk_count(%rip)       # r14 is never 0 again where count is 0
    jne 1f
    test %r14, %r14
    jnz walk_finish
1:  call *walk_pattern(%rip)            # rax = the page
    mov %rax, %r8
    call walk_random
    shr $32, %rax
    imul $100, %rax
    shr $32, %rax
    xor %r9d, %r9d
    cmp memwalk_write(%rip), %rax
    setb %r9b                           # r9 = 1 for a write
    inc %r14
    add %r9, %rbp
    lea (%r9,%r8,2), %rax
    rol $5, %r12
    xor %rax, %r12
    imul memwalk_multiplier(%rip), %r12
    call walk_address                   # rdi = where page r8 lies
    cmpq $0, memwalk_verify(%rip)
    jne 4f
    test %r9d, %r9d
    jz 3f
    mov %r14, (%rdi)
    jmp 5f
3:  mov (%rdi), %rax
    jmp 5f
4:  call walk_verify
    call walk_store
5:  dec %rbx                            # never 0 within a life where report is 0
    jnz walk_next
    mov memwalk_report_every(%rip), %rbx
    xor %eax, %eax
    ud2
    jmp walk_next

# With verify=1 every page that was ever written is looked at once more, then CPL0 says the result.
walk_finish:
    cmpq $0, memwalk_verify(%rip)
    je 2f
    xor %r8d, %r8d
1:  call walk_address
    call walk_verify
    inc %r8
    cmp %r13, %r8
    jb 1b
2:  mov $1, %eax
    ud2

# The address of page r8, into rdi. Clobbers rax, rcx.
walk_address:
    mov %r8, %rax
    mov $WALK_EXTENTS, %ecx
1:  cmp (%rcx), %rax
    jb 2f
    sub (%rcx), %rax
    add $16, %rcx
    jmp 1b
2:  shl $12, %rax
    mov 8(%rcx), %rdi
    add %rax, %rdi
    ret

# The word that page r8 begins with at version eax, into r10. Clobbers rax.
walk_first_word:
    mov %r8, %r10
    shl $32, %r10
    or %rax, %r10
    xor memwalk_seed(%rip), %r10
    imul memwalk_multiplier(%rip), %r10
    mov %r10, %rax
    shr $32, %rax
    xor %rax, %r10
    imul memwalk_mix(%rip), %r10
    ret

# Compares page r8 at rdi with its version, unless it has none yet. Clobbers rax, rcx, rdx, rsi, r10.
walk_verify:
    mov memwalk_versions(%rip), %rsi
    mov (%rsi,%r8,4), %eax
    test %eax, %eax
    jz 2f
    call walk_first_word
    mov %rdi, %rdx
    mov memwalk_words(%rip), %rcx
1:  cmp (%rdx), %r10
    jne 3f
    add memwalk_step(%rip), %r10
    add walk_word_stride(%rip), %rdx
    dec %rcx
    jnz 1b
2:  ret
3:  mov %rdx, %rdi
    mov %r8, %rsi
    mov $2, %eax
    ud2

# Writes page r8 at rdi with its next version, if r9 says so or it has none yet.
walk_store:
    mov memwalk_versions(%rip), %rsi
    mov (%rsi,%r8,4), %eax
    test %eax, %eax
    jz 1f
    test %r9d, %r9d
    jz 3f
1:  inc %eax
    jnz 2f
    inc %eax                            # after 2^32 - 1 comes 1: 0 means none
2:  mov %eax, (%rsi,%r8,4)
    call walk_first_word
    mov memwalk_words(%rip), %rcx
    mov %rdi, %rdx
4:  mov %r10, (%rdx)
    add memwalk_step(%rip), %r10
    add walk_word_stride(%rip), %rdx
    dec %rcx
    jnz 4b
3:  ret

# SplitMix64: the next random number, into rax. Clobbers rcx.
walk_random:
    add memwalk_step(%rip), %r15
    mov %r15, %rax
    mov %rax, %rcx
    shr $30, %rcx
    xor %rcx, %rax
    imul memwalk_split_1(%rip), %rax
    mov %rax, %rcx
    shr $27, %rcx
    xor %rcx, %rax
    imul memwalk_split_2(%rip), %rax
    mov %rax, %rcx
    shr $31, %rcx
    xor %rcx, %rax
    ret

walk_prepare:
    mov memwalk_pattern(%rip), %rax
    lea walk_patterns(%rip), %rcx
    mov (%rcx,%rax,8), %rax
    mov %rax, walk_pattern(%rip)
    mov memwalk_words(%rip), %rcx       # 1 to 512 words a page
    mov $512, %eax
    cmp %rax, %rcx
    cmova %rax, %rcx
    mov $1, %eax
    test %rcx, %rcx
    cmovz %rax, %rcx
    mov %rcx, memwalk_words(%rip)
    mov $4096, %eax
    xor %edx, %edx
    div %rcx
    and $-8, %rax
    mov %rax, walk_word_stride(%rip)
    bsr %r13, %rax
    inc %rax
    mov %rax, walk_octaves(%rip)
    mov %r13, %rax                      # hot pages: at least one, and not all unless there is but one
    mulq memwalk_hot(%rip)
    mov $100, %ecx
    div %rcx
    lea -1(%r13), %rcx
    cmp %rcx, %rax
    cmova %rcx, %rax
    mov $1, %ecx
    test %rax, %rax
    cmovz %rcx, %rax
    mov %rax, walk_hot_pages(%rip)
    mov %r13, %rax
    shr $2, %rax
    test %rax, %rax
    cmovz %rcx, %rax
    mov %rax, walk_window(%rip)
    mov memwalk_phase(%rip), %rax
    mov %rax, walk_phase_left(%rip)
    ret

# Each pattern gives a page in rax and may clobber rcx, rdx, rsi, rdi, r8 to r11.

walk_sequential:
    mov walk_cursor(%rip), %rax
    lea 1(%rax), %rcx
    xor %edx, %edx
    cmp %r13, %rcx
    cmovae %rdx, %rcx
    mov %rcx, walk_cursor(%rip)
    ret

walk_uniform:
    call walk_random
    mul %r13
    mov %rdx, %rax
    ret

# Rank k with probability in proportion to 1/k: an octave, a rank in it, and rejection under 1/k.
walk_zipf:
    call walk_random
    mulq walk_octaves(%rip)
    mov %rdx, %r8                       # the octave
    call walk_random
    mov %r8, %rcx
    mov $1, %edx
    shl %cl, %rdx                       # its first rank
    lea -1(%rdx), %r9
    and %rax, %r9
    add %rdx, %r9                       # the rank
    cmp %r13, %r9
    ja walk_zipf
    shr $32, %rax
    imul %r9, %rax
    shl $32, %rdx
    cmp %rdx, %rax
    jae walk_zipf
    lea -1(%r9), %rax

# Scatters rank rax over the pages: a permutation, as the factor is a prime above any number of pages.
walk_scatter:
    imul walk_prime(%rip), %rax
    xor %edx, %edx
    div %r13
    mov %rdx, %rax
    ret

walk_hotcold:
    call walk_random
    shr $32, %rax
    imul $100, %rax
    shr $32, %rax
    mov walk_hot_pages(%rip), %r8
    cmp memwalk_heat(%rip), %rax
    jb 1f
    cmp %r13, %r8
    je 1f
    call walk_random
    mov %r13, %rdx
    sub %r8, %rdx
    mul %rdx
    lea (%rdx,%r8), %rax
    jmp walk_scatter
1:  call walk_random
    mul %r8
    mov %rdx, %rax
    jmp walk_scatter

walk_phases:
    mov walk_phase_start(%rip), %r8
    cmpq $0, walk_phase_left(%rip)
    jne 1f
    mov memwalk_phase(%rip), %rax
    mov %rax, walk_phase_left(%rip)
    add walk_window(%rip), %r8
    xor %edx, %edx
    mov %r8, %rax
    div %r13
    mov %rdx, %r8
    mov %r8, walk_phase_start(%rip)
1:  decq walk_phase_left(%rip)
    call walk_random
    mulq walk_window(%rip)
    lea (%rdx,%r8), %rax
    mov %rax, %rcx
    sub %r13, %rcx
    cmovae %rcx, %rax
    ret

    runtime memwalk
    fatal_exception memwalk
    exception_stubs memwalk
    plain_tss memwalk
    .balign 16
memwalk_idt:
    exception_gates memwalk
memwalk_idt_end:

    .balign 8
memwalk_chain_seed:    .quad 0x70657264757265
memwalk_step:          .quad 0x9e3779b97f4a7c15
memwalk_multiplier:    .quad 0x517cc1b727220a95
memwalk_mix:           .quad 0xbf58476d1ce4e5b9
memwalk_split_1:       .quad 0xbf58476d1ce4e5b9
memwalk_split_2:       .quad 0x94d049bb133111eb
walk_prime:            .quad 2654435761
memwalk_pages:         .quad 0
memwalk_gibs:          .quad 0
memwalk_versions:      .quad 0
memwalk_version_pages: .quad 0
walk_pattern:          .quad 0
walk_word_stride:      .quad 0
walk_octaves:          .quad 0
walk_hot_pages:        .quad 0
walk_window:           .quad 0
walk_phase_left:       .quad 0
walk_phase_start:      .quad 0
walk_cursor:           .quad 0
walk_patterns:
  .irp p, sequential, uniform, zipf, hotcold, phases
    .quad walk_\p - memwalk_image + LOAD
  .endr
memwalk_parameters:
    parameter memwalk, pattern, 0, memwalk_pattern_names
    parameter memwalk, ws, 0x4000000
    parameter memwalk, write, 50
    parameter memwalk, count, 0
    .quad memwalk_key_report - memwalk_image + LOAD
memwalk_report_every:
    .quad 100000, 0
    parameter memwalk, verify, 0
    parameter memwalk, words, 8
    parameter memwalk, seed, 1
    parameter memwalk, hot, 10
    parameter memwalk, heat, 90
    parameter memwalk, phase, 65536
    parameter memwalk, idle, 0
    parameters_end
  .irp key, pattern, ws, write, count, report, verify, words, seed, hot, heat, phase, idle
    parameter_key memwalk, \key
  .endr
memwalk_pattern_names:
    .asciz "sequential"
    .asciz "uniform"
    .asciz "zipf"
    .asciz "hotcold"
    .asciz "phases"
    .byte 0
memwalk_name:         .asciz "memwalk"
memwalk_text_pages:   .asciz "pages "
memwalk_text_done:    .asciz "done "
memwalk_text_no_room: .asciz "ws= does not fit into the memory\n"
memwalk_text_broken:  .asciz "walk broken at touch "
memwalk_text_page:    .asciz " page "
memwalk_text_address: .asciz " address "
memwalk_found:        .byte 0

    guest_end memwalk, 4
