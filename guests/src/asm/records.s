# records: appends records to a disk or to persistent memory, each a link of a chain of hashes, and says so when a flush has made them durable.
# What a record is and what is printed is defined in `records.rs`; the two must agree to the bit.
#
# Registers that live across the whole run: r12 the device's window, r13 slots of the ring, r14 number of the last record
# written, r15 its hash. Interrupts are on while it waits, and not else.

.set RECORDS_OUT,       SCRATCH + 0x1000    # the record that is written
.set RECORDS_IN,        SCRATCH + 0x2000    # and one that is read
.set RECORDS_TABLE,     FREE                # for each slot what is there: number, hash; 0 and 0 if it is no whole record
.set RECORDS_SLOTS_MAX, 65536

    guest_begin records

records_entry:
    cli
    cld
    mov $STACK, %esp
    mov %rsi, %rbx
    lea records_name(%rip), %rsi
    call records_puts
    own_machine records
    mov %rbx, %rsi
    push %rbx
    call records_linux_cmdline
    call records_read_parameters
    pop %rbx
    call records_find_device
    call records_begin_device
    call records_lay_out
    call records_begin_interrupts
    call records_scan
    call records_make_durable           # it may have been there, and not yet durable
    lea records_text_slots(%rip), %rsi
    call records_puts
    mov %r13, %rax
    call records_put_decimal
    lea records_text_found(%rip), %rsi
    call records_print_number

records_next:
    mov records_count(%rip), %rcx
    jrcxz 1f
    cmp %rcx, %r14
    jae records_finish
1:  call records_wait_for_tick
    inc %r14
    mov %r15, %rax
    mov %r14, %rdx
    call records_fold
    mov %rax, %r15
    call records_verify_slot
    call records_compose
    call records_slot_sector
    mov $RECORDS_OUT, %edi
    mov $1, %eax
    call records_transfer
    call records_slot_row
    mov %r14, (%rsi)
    mov %r15, 8(%rsi)
    mov %r14, %rax
    xor %edx, %edx
    divq records_flush(%rip)
    test %rdx, %rdx
    jnz records_next
    call records_make_durable
    lea records_text_record(%rip), %rsi
    call records_print_number
    jmp records_next

records_finish:
    call records_make_durable
    lea records_text_done(%rip), %rsi
    call records_print_number
    jmp records_power_off

# Prints the text at rsi, the last record's number and its hash.
records_print_number:
    call records_puts
    mov %r14, %rax
    call records_put_decimal
    mov $32, %al
    call records_putc
    mov %r15, %rax
    call records_put_hex
    jmp records_newline

# Waits for the next tick of the timer, unless there is none.
records_wait_for_tick:
    cmpq $0, records_hz(%rip)
    je 3f
1:  cli
    mov records_ticks(%rip), %rax
    cmp records_done(%rip), %rax
    jne 2f
    sti
    hlt
    jmp 1b
2:  mov %rax, records_done(%rip)        # ticks that passed meanwhile are not made up for
3:  ret

# Folds rdx into the hash rax.
records_fold:
    rol $5, %rax
    xor %rdx, %rax
    imul records_multiplier(%rip), %rax
    ret

# Where record r14 belongs: its slot into rax. Clobbers rdx.
records_slot:
    lea -1(%r14), %rax
    xor %edx, %edx
    div %r13
    mov %rdx, %rax
    ret

# The first sector of that slot, into rdx. Clobbers rax.
records_slot_sector:
    call records_slot
    mov %rax, %rdx
    imul records_sectors(%rip), %rdx
    ret

# The row of that slot, into rsi. Clobbers rax, rdx.
records_slot_row:
    call records_slot
    shl $4, %rax
    lea RECORDS_TABLE(%rax), %rsi
    ret

# Record r14 with hash r15, to RECORDS_OUT. Clobbers rax, rcx, rdx, rdi.
records_compose:
    mov $RECORDS_OUT, %edi
    xor %edx, %edx                      # sector of the record
1:  mov records_magic(%rip), %rax
    stosq
    mov %r14, %rax
    stosq
    mov %r15, %rax
    stosq
    mov %rdx, %rax
    stosq
    mov %r15, %rax
    call records_fold
    mov $60, %ecx
    rep stosq
    inc %edx
    cmp records_sectors(%rip), %rdx
    jb 1b
    ret

# Looks at RECORDS_IN: r10 is the number of the record there, r11 its hash; both are 0 if it is no whole record. Clobbers
# rax, rcx, rdx, rdi.
records_examine:
    mov $RECORDS_IN, %edi
    mov 8(%rdi), %r10
    mov 16(%rdi), %r11
    xor %edx, %edx
1:  mov records_magic(%rip), %rax
    scasq
    jne 2f
    mov %r10, %rax
    scasq
    jne 2f
    mov %r11, %rax
    scasq
    jne 2f
    mov %rdx, %rax
    scasq
    jne 2f
    mov %r11, %rax
    call records_fold
    mov $60, %ecx
    repe scasq
    jne 2f
    inc %edx
    cmp records_sectors(%rip), %rdx
    jb 1b
    ret
2:  xor %r10d, %r10d
    xor %r11d, %r11d
    ret

# The slot of record r14, which is about to be overwritten, must hold what it is known to hold: no other record, nor one where there is
# none, as on a disk that did not go back when the memory did.
records_verify_slot:
    cmpq $0, records_verify(%rip)
    je 1f
    call records_slot_row
    push %rsi
    call records_slot_sector
    mov $RECORDS_IN, %edi
    xor %eax, %eax
    call records_transfer
    call records_examine
    pop %rsi
    cmp (%rsi), %r10
    jne 2f
    cmp 8(%rsi), %r11
    jne 2f
1:  ret
2:  mov (%rsi), %rax
    test %rax, %rax
    cmovnz %rax, %r14                   # the record that is to be there; where there is none, the one that is not
    mov %r10, %rax
    lea records_text_holds(%rip), %rsi
    jmp records_broken

records_refused:
    lea records_text_refused(%rip), %rsi
    jmp records_broken

# Ends the machine with code 1: record r14, what is wrong with it (rsi), and rax.
records_broken:
    cli
    push %rax
    push %rsi
    lea records_text_broken(%rip), %rsi
    call records_puts
    mov %r14, %rax
    call records_put_decimal
    pop %rsi
    call records_puts
    pop %rax
    call records_put_hex
    call records_newline
    mov $1, %al
    jmp records_debug_exit

records_usage:
    call records_puts
    mov $2, %al
    jmp records_debug_exit

# How many slots there are, into r13; there must be memory for a table of them. rbx = boot_params.
records_lay_out:
    mov records_size(%rip), %rax
    shr $9, %rax
    mov %rax, records_sectors(%rip)
    lea -1(%rax), %rdx
    cmp $7, %rdx
    ja 4f
    mov %rax, %rcx
    mov records_capacity(%rip), %rax
    xor %edx, %edx
    div %rcx
    mov $RECORDS_SLOTS_MAX, %ecx
    cmp %rcx, %rax
    cmova %rcx, %rax
    mov %rax, %r13
    mov records_flush(%rip), %rdx       # a slot is not overwritten before what is in it is durable for long
    lea -1(%rdx), %rcx
    cmp $RECORDS_SLOTS_MAX, %rcx
    jae 4f
    shl $3, %rdx
    cmp %rdx, %r13
    jb 4f
    movzbl 0x1e8(%rbx), %ecx
    add $0x2d0, %rbx
    mov $FREE, %edi
    mov %r13, %rdx
    shl $4, %rdx
    add %rdi, %rdx                      # the table's end
1:  test %ecx, %ecx
    jz 4f
    mov (%rbx), %rax                    # the e820 entry: base, size, type
    mov 8(%rbx), %rsi
    add %rax, %rsi
    cmpl $1, 16(%rbx)
    jne 2f
    cmp %rdi, %rax
    ja 2f
    cmp %rdx, %rsi
    jae 3f
2:  add $20, %rbx
    dec %ecx
    jmp 1b
3:  ret
4:  lea records_text_no_room(%rip), %rsi
    jmp records_usage

# The timer through the PICs, unless there is none; the device through the I/O APIC.
records_begin_interrupts:
    pic_through_lint0 0xfe
    mov records_hz(%rip), %rcx
    test %rcx, %rcx
    jnz 1f
    out8 0x21, 0xff
    jmp 2f
1:  pit_periodic
2:  jmp records_begin_device_interrupts

# Finds the last record: number and hash into r14 and r15. Records up to the last flush must be there, those behind it may.
records_scan:
    mov $1, %r14d                       # of each slot the first record that belongs there
    xor %ebx, %ebx                      # the greatest number that is there
1:  call records_slot_sector
    mov $RECORDS_IN, %edi
    xor %eax, %eax
    call records_transfer
    call records_examine
    call records_slot_row
    mov %r10, (%rsi)
    mov %r11, 8(%rsi)
    lea -1(%r10), %rax                  # one that belongs elsewhere does not count
    xor %edx, %edx
    div %r13
    inc %rdx
    cmp %rdx, %r14
    jne 2f
    cmp %rbx, %r10
    cmova %r10, %rbx
2:  inc %r14
    cmp %r13, %r14
    jbe 1b

    mov records_seed(%rip), %r15        # rbx becomes the last record that was flushed for certain
    xor %r14d, %r14d
    test %rbx, %rbx
    jz 8f
    lea -1(%rbx), %rax
    xor %edx, %edx
    divq records_flush(%rip)
    mulq records_flush(%rip)
    mov %rax, %rbx
    mov records_flush(%rip), %rcx       # what is behind may have been flushed, too, and as many more been written: in whose slots
    lea (%rax,%rcx,2), %rax             # nothing need be whole
    sub %r13, %rax
    jns 3f
    xor %eax, %eax
3:  mov %rax, %r14
    cmp $1, %rax
    sbb %r8, %r8                        # all ones: the chain is known from its seed on
4:  cmp %rbx, %r14
    jae 6f
    inc %r14
    call records_slot_row
    cmp %r14, (%rsi)
    jne records_lost
    mov 8(%rsi), %r11
    test %r8, %r8
    jz 5f
    mov %r15, %rax
    mov %r14, %rdx
    call records_fold
    cmp %rax, %r11
    jne records_altered
5:  mov $-1, %r8
    mov %r11, %r15
    jmp 4b

6:  inc %r14                            # and what follows it without a gap
    call records_slot_row
    cmp %r14, (%rsi)
    jne 7f
    mov %r15, %rax
    mov %r14, %rdx
    call records_fold
    cmp %rax, 8(%rsi)
    jne 7f
    mov %rax, %r15
    jmp 6b
7:  dec %r14                            # what lies behind a gap is written again
8:  ret
records_lost:
    mov (%rsi), %rax
    lea records_text_holds(%rip), %rsi
    jmp records_broken
records_altered:
    mov %r11, %rax
    lea records_text_hash(%rip), %rsi
    jmp records_broken

records_timer:
    push %rax
    incq records_ticks(%rip)
    mov $0x20, %al
    out %al, $0x20
    pop %rax
    iretq

records_spurious:
    iretq

records_exception:
    jmp records_fatal

    storage records
    runtime records
    fatal_exception records
    exception_stubs records
    plain_tss records

    .balign 16
records_idt:
    exception_gates records
    idt_gate records, records_timer
  .rept 15
    idt_gate records, records_spurious
  .endr
    idt_gate records, records_device_interrupt
records_idt_end:

    .balign 8
records_seed:       .quad 0x70657264757265
records_multiplier: .quad 0x517cc1b727220a95
records_magic:      .quad 0x64726f6365723a70    # "p:record"
records_sectors:    .quad 0                     # of a record
records_ticks:      .quad 0                     # by the interrupt handler
records_done:       .quad 0                     # of them, waited for
records_parameters:
    parameter records, count, 0
    parameter records, flush, 1
    parameter records, hz, 100
    parameter records, on, 0, records_on_names
    parameter records, size, 4096
    parameter records, verify, 1
    parameters_end
  .irp key, count, flush, hz, on, size, verify
    parameter_key records, \key
  .endr
records_on_names:
    .asciz "disk"
    .asciz "pmem"
    .byte 0
records_name:          .asciz "records"
records_text_slots:    .asciz "slots "
records_text_found:    .asciz " found "
records_text_record:   .asciz "record "
records_text_done:     .asciz "done "
records_text_broken:   .asciz "chain broken at record "
records_text_holds:    .asciz " its slot holds "
records_text_hash:     .asciz " hash "
records_text_refused:  .asciz " device status "
records_text_no_room:  .asciz "size= is not 512 to 4096, flush= not 1 to an eighth of the slots, or memory is too small\n"

    guest_end records
