# pages: touches the pages that a list names, round and round. The host gives the list as the initial RAM disk.
# What it does is defined in `pages.rs`; the two must agree to the bit.
#
# The walk runs at CPL3 and asks CPL0 for a service by `ud2` with its number in eax, as memwalk does and for its reasons.
#
# Registers of the walk: rbx next entry of the list, r15 its first and r9 its end, r10 accesses left to the next line,
# r11 versions, r12 hash, r13 pages, r14 accesses done, rbp writes. Services leave these as they are.

.set PAGES_EXTENTS,    SCRATCH          # (pages, address) of each stretch of memory; the last has pages = 2^64 - 1
.set PAGES_USER_STACK, SCRATCH + 0x8000
.set PAGES_PROGRESS,   SCRATCH + 0xb000 # accesses done, for the host to read: `pages::PROGRESS_ADDRESS`

    guest_begin pages

pages_entry:
    cli
    cld
    mov $STACK, %esp
    mov %rsi, %r12
    movq $0, PAGES_PROGRESS
    lea pages_name(%rip), %rsi
    call pages_puts
    own_machine pages
    mov %r12, %rsi
    call pages_linux_cmdline
    call pages_read_parameters
    mov 0x218(%r12), %eax               # boot_params: ramdisk_image, ext_ramdisk_image, and their sizes
    mov 0xc0(%r12), %ecx
    shl $32, %rcx
    or %rcx, %rax
    mov %rax, pages_list(%rip)
    mov 0x21c(%r12), %edx
    mov 0xc4(%r12), %ecx
    shl $32, %rcx
    or %rcx, %rdx
    add %rdx, %rax
    mov %rax, pages_list_end(%rip)
    lea pages_text_no_list(%rip), %rsi
    test %rdx, %rdx
    jz pages_usage
    lea pages_text_odd(%rip), %rsi
    test $3, %dl
    jnz pages_usage
    call pages_find_memory
    push $USER_DATA
    push $PAGES_USER_STACK
    push $2
    push $USER_CODE
    lea pages_start(%rip), %rax
    push %rax
    iretq

# Ends with the text at rsi: the parameters cannot be met.
pages_usage:
    call pages_puts
    mov $2, %al
    jmp pages_debug_exit

# Finds the stretches of usable memory from FREE on, less the list. r12 = boot_params.
pages_find_memory:
    movzbl 0x1e8(%r12), %ecx
    lea 0x2d0(%r12), %rsi
    mov $PAGES_EXTENTS, %edi
    xor %r8d, %r8d                      # pages in all
    xor %r9d, %r9d                      # end of memory
    mov pages_list(%rip), %r10
    and $-4096, %r10
    mov pages_list_end(%rip), %r11
    add $4095, %r11
    and $-4096, %r11
1:  test %ecx, %ecx
    jz 5f
    cmpl $1, 16(%rsi)
    jne 4f
    mov (%rsi), %rax
    mov 8(%rsi), %rdx
    add %rax, %rdx                      # a usable stretch from rax to rdx
    mov $512 << 30, %rbx                # what one page directory pointer table maps
    cmp %rbx, %rdx
    cmova %rbx, %rdx
    add $4095, %rax
    and $-4096, %rax
    and $-4096, %rdx
    mov $FREE, %ebx
    cmp %rbx, %rax
    cmovb %rbx, %rax
    cmp %rdx, %rax
    jae 4f
    cmp %r9, %rdx
    cmova %rdx, %r9
    cmp %rax, %r10
    jb 2f
    cmp %rdx, %r11
    ja 2f
    movb $1, pages_list_found(%rip)     # the list lies in this one: before it, and behind it
    mov %rdx, %rbx
    mov %r10, %rdx
    call pages_add_extent
    mov %r11, %rax
    mov %rbx, %rdx
2:  call pages_add_extent
4:  add $20, %rsi
    dec %ecx
    jmp 1b
5:  movq $-1, (%rdi)
    movq $0, 8(%rdi)
    mov %r8, pages_free(%rip)
    add $0x3fffffff, %r9
    shr $30, %r9
    mov %r9, pages_gibs(%rip)
    lea pages_text_lost_list(%rip), %rsi
    cmpb $0, pages_list_found(%rip)
    je pages_usage
    ret

# Adds the stretch from rax to rdx, if it has pages.
pages_add_extent:
    sub %rax, %rdx
    jbe 1f
    shr $12, %rdx
    mov %rdx, (%rdi)
    mov %rax, 8(%rdi)
    add %rdx, %r8
    add $16, %rdi
1:  ret

# Services. The stack: vector, error code, RIP, CS, RFLAGS, RSP, SS.
pages_exception:
    cmpq $6, (%rsp)
    jne pages_fatal
    testb $3, 24(%rsp)
    jz pages_fatal
    addq $2, 16(%rsp)                   # behind the ud2
    cmp $1, %eax
    jb pages_service_at
    je pages_service_done
    cmp $3, %eax
    jb pages_service_list
    je pages_service_damaged
    cmp $5, %eax
    jb pages_service_beyond
    mov %rdi, %rsi                      # 5: the text at rdi, and an end
    jmp pages_usage

pages_service_at:                       # 0: a line, and a report
    lea pages_text_at(%rip), %rsi
    call pages_puts
    mov %r14, %rax
    call pages_put_decimal
    call pages_newline
    mov %r14, %rax
    call pages_report
    add $16, %rsp
    iretq

pages_service_done:                     # 1
    mov %r14, %rax
    call pages_report
    lea pages_text_done(%rip), %rsi
    call pages_puts
    mov %r14, %rax
    call pages_put_decimal
    mov $32, %al
    call pages_putc
    mov %rbp, %rax
    call pages_put_decimal
    mov $32, %al
    call pages_putc
    mov %r12, %rax
    call pages_put_hex
    call pages_newline
    jmp pages_power_off

pages_service_list:                     # 2: the list is good
    lea pages_text_list(%rip), %rsi
    call pages_puts
    mov %r9, %rax
    sub %r15, %rax
    shr $2, %rax
    call pages_put_decimal
    lea pages_text_pages(%rip), %rsi
    call pages_puts
    mov %r13, %rax
    call pages_put_decimal
    call pages_newline
    add $16, %rsp
    iretq

pages_service_damaged:                  # 3: rdi = address, r8 = page; the word there in rcx, the one that was due in rbx
    push %rcx
    lea pages_text_damaged(%rip), %rsi
    call pages_puts
    mov %r8, %rax
    call pages_put_decimal
    lea pages_text_at_access(%rip), %rsi
    call pages_puts
    mov %r14, %rax
    call pages_put_decimal
    lea pages_text_address(%rip), %rsi
    call pages_puts
    mov %rdi, %rax
    call pages_put_hex
    lea pages_text_holds(%rip), %rsi
    call pages_puts
    pop %rax
    call pages_put_hex
    lea pages_text_due(%rip), %rsi
    call pages_puts
    mov %rbx, %rax
    call pages_put_hex
    call pages_newline
    mov $1, %al
    jmp pages_debug_exit

pages_service_beyond:                   # 4: entry rbx names page rdi
    lea pages_text_entry(%rip), %rsi
    call pages_puts
    mov %rbx, %rax
    sub %r15, %rax
    shr $2, %rax
    call pages_put_decimal
    lea pages_text_names(%rip), %rsi
    call pages_puts
    mov %rdi, %rax
    call pages_put_decimal
    lea pages_text_beyond(%rip), %rsi
    call pages_puts
    mov %r13, %rax
    call pages_put_decimal
    call pages_newline
    mov $2, %al
    jmp pages_debug_exit

# ---- From here on CPL3. ----

pages_start:
    mov $FREE, %edi                     # map what lies beyond the first GiB, in pages of 2 MiB
    mov $1, %r8d
1:  cmp pages_gibs(%rip), %r8
    jae 3f
    lea pages_pdpt(%rip), %rsi
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
3:  mov pages_list(%rip), %r15
    mov pages_list_end(%rip), %r9
    mov pages_pages(%rip), %r13
    call pages_check_list
    call pages_lay_out
    mov $2, %eax
    ud2
    xor %r14d, %r14d
    xor %ebp, %ebp
    mov pages_chain_seed(%rip), %r12
    mov pages_every(%rip), %r10
    mov %r15, %rbx

pages_next:
    cmp %r14, pages_count(%rip)         # r14 is never 0 again where count is 0
    jne 1f
    test %r14, %r14
    jz 1f
    mov $1, %eax
    ud2
1:  mov (%rbx), %eax
    add $4, %rbx
    cmp %r9, %rbx
    cmovae %r15, %rbx
    rol $5, %r12
    xor %rax, %r12
    imul pages_multiplier(%rip), %r12
    mov %eax, %esi
    shr $31, %esi                       # esi = 1 for a write
    and pages_write_and(%rip), %esi
    or pages_write_or(%rip), %esi
    mov %eax, %r8d
    and $0x7fffffff, %r8d
    inc %r14
    add %rsi, %rbp
    cmp %r13, %r8
    jae pages_damaged_list
    call pages_address
    lea 1(%r8), %rdx                    # the stamp of page r8, into rdx
    imul pages_step(%rip), %rdx
    mov %rdx, %rax
    shr $32, %rax
    xor %rax, %rdx
    imul pages_mix(%rip), %rdx
    mov (%r11,%r8,4), %eax              # its version
    cmp $-1, %eax
    je pages_first
    test %eax, %eax
    jz pages_damaged_version
    mov (%rdi), %rcx
    cmp %rcx, %rdx
    jne pages_damaged_first
    mov 8(%rdi), %rcx
    cmp %rcx, %rax
    jne pages_damaged_count
    add %rdx, %rax
    mov 4088(%rdi), %rcx
    cmp %rcx, %rax
    jne pages_damaged_last
    mov %r12, %rcx                      # one word more, of 2 to 510: any, by the upper bits of the hash
    shr $48, %rcx
    imul $509, %rcx
    shr $16, %rcx
    add $2, %ecx
    mov pages_step(%rip), %rax
    imul %rcx, %rax
    add %rdx, %rax
    cmp %rax, (%rdi,%rcx,8)
    jne pages_damaged_word
3:  test %esi, %esi
    jz 5f
    mov (%r11,%r8,4), %eax
    inc %eax
    cmp $-1, %eax
    jne 4f
    mov $1, %eax                        # 0 and 2^32 - 1 are no versions
4:  mov %eax, (%r11,%r8,4)
    mov %rax, 8(%rdi)
    add %rdx, %rax
    mov %rax, 4088(%rdi)
5:  mov %r14, PAGES_PROGRESS
    dec %r10                            # never 0 within a life where every is 0
    jnz pages_next
    mov pages_every(%rip), %r10
    xor %eax, %eax
    ud2
    jmp pages_next

# The first touch of page r8 at rdi: all its words are written. Then back for the rest of the access.
pages_first:
    mov %rdx, %rax
    xor %ecx, %ecx
1:  mov %rax, (%rdi,%rcx,8)
    add pages_step(%rip), %rax
    inc %ecx
    cmp $512, %ecx
    jb 1b
    movl $1, (%r11,%r8,4)
    movq $1, 8(%rdi)
    lea 1(%rdx), %rax
    mov %rax, 4088(%rdi)
    jmp 3b

pages_damaged_list:                     # the entry was good when the walk began
    lea -4(%rbx), %rdi
    cmp %r15, %rbx
    jne 1f
    lea -4(%r9), %rdi
1:  mov (%rdi), %ecx
    mov %r13, %rbx
    jmp 2f
pages_damaged_version:
    lea (%r11,%r8,4), %rdi
    xor %ecx, %ecx
    mov $1, %ebx
    jmp 2f
pages_damaged_first:
    mov %rdx, %rbx
    jmp 2f
pages_damaged_count:
    add $8, %rdi
    mov %rax, %rbx
    jmp 2f
pages_damaged_last:
    add $4088, %rdi
    mov %rax, %rbx
    jmp 2f
pages_damaged_word:
    lea (%rdi,%rcx,8), %rdi
    mov (%rdi), %rcx
    mov %rax, %rbx
2:  mov $3, %eax
    ud2

# The address of page r8, into rdi. Clobbers rax, rcx.
pages_address:
    mov %r8, %rax
    mov $PAGES_EXTENTS, %ecx
1:  cmp (%rcx), %rax
    jb 2f
    sub (%rcx), %rax
    add $16, %rcx
    jmp 1b
2:  shl $12, %rax
    mov 8(%rcx), %rdi
    add %rax, %rdi
    ret

# Every entry must name one of the pages; where pages=0 there are as many as the list needs.
pages_check_list:
    mov %r15, %rbx
    xor %edi, %edi                      # the greatest
1:  mov (%rbx), %eax
    and $0x7fffffff, %eax
    cmp %rax, %rdi
    cmovb %rax, %rdi
    test %r13, %r13
    jz 2f
    cmp %r13, %rax
    jb 2f
    mov %rax, %rdi
    mov $4, %eax
    ud2
2:  add $4, %rbx
    cmp %r9, %rbx
    jb 1b
    test %r13, %r13
    jnz 3f
    lea 1(%rdi), %r13
3:  ret

# At FREE the page directories, then the versions; the pages are what follows. All versions say "never touched".
pages_lay_out:
    mov pages_gibs(%rip), %rdx
    dec %rdx                            # pages of directories
    mov %rdx, %r11
    shl $12, %r11
    add $FREE, %r11                     # versions
    lea 1023(%r13), %rax                # 4 bytes a page
    shr $10, %rax
    mov %rax, %rcx
    add %rax, %rdx
    mov $PAGES_EXTENTS, %esi
    lea pages_text_no_room(%rip), %rdi
1:  cmpq $FREE, 8(%rsi)
    je 2f
    cmpq $-1, (%rsi)
    je 4f
    add $16, %rsi
    jmp 1b
2:  cmp %rdx, (%rsi)
    jb 4f
    sub %rdx, (%rsi)
    mov pages_free(%rip), %rax
    sub %rdx, %rax
    shl $12, %rdx
    add %rdx, 8(%rsi)
    cmp %r13, %rax
    jb 4f
    mov %r11, %rdi
    shl $9, %rcx
    mov $-1, %rax
    rep stosq
    mov pages_writes(%rip), %rax        # 0: by the list, 1: all, 2: none
    mov $1, %ecx
    xor %edx, %edx
    cmp $2, %eax
    cmove %edx, %ecx
    mov %ecx, pages_write_and(%rip)
    xor %ecx, %ecx
    cmp $1, %eax
    sete %cl
    mov %ecx, pages_write_or(%rip)
    ret
4:  mov $5, %eax
    ud2

    runtime pages
    fatal_exception pages
    exception_stubs pages
    plain_tss pages
    .balign 16
pages_idt:
    exception_gates pages
pages_idt_end:

    .balign 8
pages_chain_seed: .quad 0x70657264757265
pages_step:       .quad 0x9e3779b97f4a7c15
pages_multiplier: .quad 0x517cc1b727220a95
pages_mix:        .quad 0xbf58476d1ce4e5b9
pages_list:       .quad 0
pages_list_end:   .quad 0
pages_free:       .quad 0
pages_gibs:       .quad 0
pages_write_and:  .long 0
pages_write_or:   .long 0
pages_parameters:
    parameter pages, pages, 0
    parameter pages, writes, 0, pages_writes_names
    parameter pages, count, 0
    parameter pages, every, 10000000
    parameters_end
  .irp key, pages, writes, count, every
    parameter_key pages, \key
  .endr
pages_writes_names:
    .asciz "list"
    .asciz "all"
    .asciz "none"
    .byte 0
pages_name:           .asciz "pages"
pages_text_list:      .asciz "list "
pages_text_pages:     .asciz " pages "
pages_text_at:        .asciz "at "
pages_text_done:      .asciz "done "
pages_text_no_list:   .asciz "no list: give one as the initial RAM disk\n"
pages_text_odd:       .asciz "the list is no whole number of 4-byte entries\n"
pages_text_lost_list: .asciz "the list does not lie in usable memory\n"
pages_text_no_room:   .asciz "pages= does not fit into the memory\n"
pages_text_entry:     .asciz "entry "
pages_text_names:     .asciz " of the list names page "
pages_text_beyond:    .asciz ", beyond pages="
pages_text_damaged:   .asciz "pages: damaged page "
pages_text_at_access: .asciz " at access "
pages_text_address:   .asciz " address "
pages_text_holds:     .asciz " holds "
pages_text_due:       .asciz " due "
pages_list_found:     .byte 0

    guest_end pages, 4
