//! What is said when a thread is refused a system call.
//!
//! The system sends SIGSYS to the thread in place of the call. Its handler may only do what is safe anywhere: it takes no lock and no memory,
//! and ends the process without anything that would have been done on the way.

use std::io;

use vmm_sys_util::signal::register_signal_handler;

use super::numbers;

/// Why the handler was called (`SYS_SECCOMP`, asm-generic/siginfo.h).
const BY_SECCOMP: libc::c_int = 1;
/// Where `siginfo_t` has the number of the call (`si_syscall`), in words of 4 bytes (asm-generic/siginfo.h).
const CALL_WORD: usize = 6;
/// Exit status of a process that failed.
const FAILED: libc::c_int = 1;

/// Catches SIGSYS.
pub(super) fn catch() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, on_refusal).map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

extern "C" fn on_refusal(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system hands a handler of SA_SIGINFO a `siginfo_t` of 128 bytes, which has this field in its seventh word.
    let (code, call) = unsafe { ((*info).si_code, *info.cast::<libc::c_int>().add(CALL_WORD)) };
    // SAFETY: and a `ucontext_t`, which lives as long as the handler runs.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let mut line = Line::new();
    if code == BY_SECCOMP {
        let argument =
            |register: libc::c_int| registers.get(register as usize).copied().unwrap_or_default().cast_unsigned();
        line.text("perdure: the jail refused thread '").thread_name().text("' the system call ").number(call);
        line.text(" (").text(numbers::name(call)).text("; arguments");
        for register in [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10] {
            line.text(" 0x").hexadecimal(argument(register));
        }
        line.text("), and the VM's process ends as if it had been killed. Please report this line; --no-jail runs a VM without the jail\n");
    } else {
        line.text("perdure: killed by SIGSYS, which somebody sent\n");
    }
    // SAFETY: the line's bytes are there; both calls are async-signal-safe, and every role may make them.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.length);
        libc::_exit(FAILED);
    }
}

/// A line that takes no memory from anywhere. What does not fit is left out.
struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl Line {
    fn new() -> Self {
        Self { bytes: [0; 512], length: 0 }
    }

    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.length) {
            *place = byte;
            self.length += 1;
        }
    }

    fn text(&mut self, text: &str) -> &mut Self {
        text.bytes().for_each(|byte| self.push(byte));
        self
    }

    fn number(&mut self, number: libc::c_int) -> &mut Self {
        let number = number.unsigned_abs();
        let digits = number.checked_ilog10().unwrap_or(0);
        for digit in (0..=digits).rev() {
            self.push(b'0' + u8::try_from(number / 10_u32.pow(digit) % 10).unwrap_or_default());
        }
        self
    }

    fn hexadecimal(&mut self, number: u64) -> &mut Self {
        let digits = number.checked_ilog2().unwrap_or(0) / 4;
        for digit in (0..=digits).rev() {
            let digit = usize::try_from(number >> (4 * digit) & 0xf).unwrap_or_default();
            self.push(b"0123456789abcdef".get(digit).copied().unwrap_or(b'?'));
        }
        self
    }

    fn thread_name(&mut self) -> &mut Self {
        let mut name = [0_u8; 16];
        // SAFETY: PR_GET_NAME writes 16 bytes at most, with a zero at the end; every role may ask for it.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        name.into_iter().take_while(|byte| *byte != 0).for_each(|byte| self.push(byte));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_people_write_them() {
        let mut line = Line::new();
        line.number(0).text(" ").number(435).text(" ").number(1_000).text(" 0x").hexadecimal(0).text(" 0x");
        line.hexadecimal(0xae80).text(" 0x").hexadecimal(u64::MAX);
        assert_eq!(&line.bytes[..line.length], b"0 435 1000 0x0 0xae80 0xffffffffffffffff");
    }

    #[test]
    fn a_line_that_is_too_long_is_cut() {
        let mut line = Line::new();
        line.text(&"x".repeat(1000));
        assert_eq!(line.length, 512);
    }
}
