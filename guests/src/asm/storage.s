# A guest's storage: a virtio disk, or virtio persistent memory, by the MMIO transport. What a guest includes with `storage`.

.set STORAGE_WINDOWS,   0xd0000000          # virtio-mmio (virtio 1.2, section 4.2), a page each
.set STORAGE_WINDOW,    0x1000
.set STORAGE_WINDOWS_N, 16
.set STORAGE_IOAPIC,    0xfec00000
.set STORAGE_PIN,       5                   # the pins of the I/O APIC from here on are those of virtio devices
.set STORAGE_PINS,      18
.set STORAGE_VECTOR,    0x30

.set STORAGE_QUEUE,     8                   # entries; one request of three is in it at a time
.set STORAGE_DESC,      SCRATCH             # descriptors: address, length in 4, flags in 2, next in 2
.set STORAGE_AVAIL,     SCRATCH + 0x100
.set STORAGE_USED,      SCRATCH + 0x200
.set STORAGE_HEADER,    SCRATCH + 0x300     # of the request: type in 4, 0 in 4, sector
.set STORAGE_STATUS,    SCRATCH + 0x310
.set STORAGE_PD,        SCRATCH + 0x4000     # page directory of the GiB that persistent memory begins

# The first disk, or where \g_on is not 0 the first persistent memory. The guest has that word and \g_sectors, the sectors of a unit of transfer;
# \g_usage, where it goes with a text in rsi if there is no such device, or none that can be used; and \g_refused, where it goes with the status in
# rax if a request fails. It keeps r12, the device's window, whenever interrupts are on, and has them on only while it waits.
.macro storage g
# The device's window, into r12. Clobbers rax, rcx, rbp.
\g\()_find_device:
    mov $2, %ebp
    mov $27, %eax
    cmpq $0, \g\()_on(%rip)
    cmovne %eax, %ebp
    mov $STORAGE_WINDOWS, %r12d
    mov $STORAGE_WINDOWS_N, %ecx
1:  cmpl $0x74726976, (%r12)            # "virt"
    jne 2f
    cmpl $2, 4(%r12)                    # version
    jne 2f
    cmp %ebp, 8(%r12)
    je 3f
2:  add $STORAGE_WINDOW, %r12
    dec %ecx
    jnz 1b
    lea \g\()_text_no_device(%rip), %rsi
    jmp \g\()_usage
3:  ret

# The handshake of virtio 1.2, sections 3.1 and 4.2.3: flushes and nothing else, one queue. Clobbers
# rax, rcx, rdx, rdi, rbp.
\g\()_begin_device:
    mov $SCRATCH, %edi
    xor %eax, %eax
    mov $0x400, %ecx
    rep stosb
    movl $STORAGE_HEADER, STORAGE_DESC
    movl $16, STORAGE_DESC + 8
    movw $1, STORAGE_DESC + 12          # the next one is 1 or 2
    movl $1, STORAGE_DESC + 40
    mov $0x200, %ebp                    # VIRTIO_BLK_F_FLUSH
    cmpq $0, \g\()_on(%rip)
    je 2f
    movl $4, STORAGE_DESC + 8
    movl $4, STORAGE_DESC + 40
    xor %ebp, %ebp
2:  movw $2, STORAGE_DESC + 16 + 14
    movl $STORAGE_STATUS, STORAGE_DESC + 32
    movw $2, STORAGE_DESC + 44          # to be written by the device
    movl $0, 0x70(%r12)                 # reset, ACKNOWLEDGE, DRIVER
    movl $1, 0x70(%r12)
    movl $3, 0x70(%r12)
    movl $0, 0x14(%r12)
    mov 0x10(%r12), %eax
    and %ebp, %eax
    cmp %ebp, %eax
    jne 1f
    movl $0, 0x24(%r12)
    mov %ebp, 0x20(%r12)
    movl $1, 0x24(%r12)
    movl $1, 0x20(%r12)                 # VIRTIO_F_VERSION_1
    movl $11, 0x70(%r12)                # FEATURES_OK
    testl $8, 0x70(%r12)
    jz 1f
    movl $0, 0x30(%r12)
    movl $STORAGE_QUEUE, 0x38(%r12)
    movl $STORAGE_DESC, 0x80(%r12)
    movl $0, 0x84(%r12)
    movl $STORAGE_AVAIL, 0x90(%r12)
    movl $0, 0x94(%r12)
    movl $STORAGE_USED, 0xa0(%r12)
    movl $0, 0xa4(%r12)
    movl $1, 0x44(%r12)
    movl $15, 0x70(%r12)                # DRIVER_OK
    xor %edi, %edi
    call \g\()_config
    mov %rax, \g\()_capacity(%rip)
    cmpq $0, \g\()_on(%rip)
    je 3f
    mov %rax, \g\()_pmem(%rip)
    mov %rax, %rdx                      # at the beginning of a GiB, from the fifth to the 512th
    shr $30, %rdx
    sub $4, %rdx
    cmp $508, %rdx
    jae 1f
    test $0x3fffffff, %eax
    jnz 1f
    mov $8, %edi
    call \g\()_config
    shr $9, %rax
    mov $1 << 21, %ecx                  # one GiB of it is mapped
    cmp %rcx, %rax
    cmova %rcx, %rax
    mov %rax, \g\()_capacity(%rip)
    call \g\()_map_pmem
3:  ret
1:  lea \g\()_text_unusable(%rip), %rsi
    jmp \g\()_usage

# The 64 bits at rdi of the device's configuration, into rax. Clobbers rdx.
\g\()_config:
    mov 0x104(%r12,%rdi), %eax
    shl $32, %rax
    mov 0x100(%r12,%rdi), %edx
    or %rdx, %rax
    ret

# The GiB that persistent memory begins, at the same addresses, in pages of 2 MiB. Clobbers rax, rcx, rdx, rdi.
\g\()_map_pmem:
    mov \g\()_pmem(%rip), %rax
    mov %rax, %rdx
    shr $30, %rdx
    lea \g\()_pdpt(%rip), %rdi
    movq $(STORAGE_PD + 3), (%rdi,%rdx,8)
    or $0x83, %rax
    mov $STORAGE_PD, %edi
    mov $512, %ecx
1:  mov %rax, (%rdi)
    add $0x200000, %rax
    add $8, %rdi
    dec %ecx
    jnz 1b
    ret

# All that was written is durable when this returns. Clobbers rax, rcx, rdx.
\g\()_make_durable:
    mov $4, %eax
    xor %edx, %edx
    jmp \g\()_request

# Reads (eax 0) or writes (1) a unit: rdx the first sector, edi its memory. Clobbers rax, rcx, rdx, rsi, rdi.
\g\()_transfer:
    cmpq $0, \g\()_on(%rip)
    je \g\()_request
    shl $9, %rdx                        # persistent memory: loads and stores
    add \g\()_pmem(%rip), %rdx
    mov %rdi, %rsi
    test %eax, %eax
    jz 1f
    mov %rdx, %rdi
    jmp 2f
1:  mov %rdx, %rsi
2:  mov \g\()_sectors(%rip), %rcx
    shl $6, %rcx
    rep movsq
    ret

# Asks the device: eax 0 read, 1 write, 4 flush; rdx the first sector, edi the memory of a unit. Waits for the answer.
# Clobbers rax, rcx, rdx.
\g\()_request:
    mov %eax, STORAGE_HEADER
    movl $0, STORAGE_HEADER + 4
    mov %rdx, STORAGE_HEADER + 8
    cmpq $0, \g\()_on(%rip)
    je 5f
    movl $0, STORAGE_HEADER             # a flush is VIRTIO_PMEM_REQ_TYPE_FLUSH
5:  movl $0xff, STORAGE_STATUS          # a disk answers with one byte, persistent memory with four
    mov %edi, STORAGE_DESC + 16
    mov \g\()_sectors(%rip), %rcx
    shl $9, %ecx
    mov %ecx, STORAGE_DESC + 24
    mov $1, %ecx                        # a next one; and to be written by the device, where it is a read
    test %eax, %eax
    jnz 1f
    mov $3, %ecx
1:  mov %cx, STORAGE_DESC + 28
    mov $1, %ecx
    cmp $4, %eax
    jne 2f
    mov $2, %ecx                        # no data
2:  mov %cx, STORAGE_DESC + 14
    movzwl STORAGE_AVAIL + 2, %eax      # ring[index] is 0, the first descriptor, for ever
    inc %eax
    mov %ax, STORAGE_AVAIL + 2
    movl $0, 0x50(%r12)                 # QueueNotify
3:  cli
    movzwl STORAGE_USED + 2, %ecx
    cmp %cx, STORAGE_AVAIL + 2
    je 4f
    sti
    hlt
    jmp 3b
4:  mov STORAGE_STATUS, %eax
    test %eax, %eax
    jnz \g\()_refused
    ret

# Interrupts of virtio devices through the I/O APIC, whichever pin is this one's, at vector STORAGE_VECTOR. Clobbers rax, rcx, rdx, rdi.
\g\()_begin_device_interrupts:
    mov $LAPIC, %edi
    mov 0x20(%rdi), %edx                # to this processor
    and $0xff000000, %edx
    mov $STORAGE_IOAPIC, %edi
    mov $(0x10 + 2 * STORAGE_PIN), %eax
    mov $STORAGE_PINS, %ecx
1:  inc %eax
    mov %eax, (%rdi)
    mov %edx, 0x10(%rdi)
    dec %eax
    mov %eax, (%rdi)
    movl $STORAGE_VECTOR, 0x10(%rdi)    # edge-triggered, active-high, fixed
    add $2, %eax
    dec %ecx
    jnz 1b
    ret

\g\()_device_interrupt:
    push %rax
    mov 0x60(%r12), %eax                # InterruptStatus, InterruptACK
    mov %eax, 0x64(%r12)
    mov $LAPIC, %eax
    movl $0, 0xb0(%rax)                 # end of interrupt
    pop %rax
    iretq

    .balign 8
\g\()_capacity: .quad 0               # of the device, in sectors
\g\()_pmem:     .quad 0               # its address, where it is persistent memory
\g\()_text_no_device: .asciz "nothing to write to: give a disk with --disk, or with on=pmem persistent memory with --pmem\n"
\g\()_text_unusable: .asciz "the device cannot be used: it has no flush, refuses what is asked of it, or lies where it cannot be mapped\n"
.endm
