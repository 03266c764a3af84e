# boot: one line at once, then rest. What a start costs is the time to its first byte.

    guest_begin boot

boot_entry:
    cli
    cld
    mov $STACK, %esp
    lea boot_text(%rip), %rsi
    call boot_puts
    own_machine boot
    mov $1, %eax
    call boot_report
1:  hlt                                 # interrupts are off: this is for ever
    jmp 1b

boot_exception:
    jmp boot_fatal

    runtime boot
    fatal_exception boot
    exception_stubs boot
    plain_tss boot
    .balign 16
boot_idt:
    exception_gates boot
boot_idt_end:
    .balign 8
boot_parameters:
    parameters_end
boot_text: .asciz "boot\n"

    guest_end boot
