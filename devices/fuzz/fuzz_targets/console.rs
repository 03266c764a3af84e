#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| devices::fuzz::console(bytes));
