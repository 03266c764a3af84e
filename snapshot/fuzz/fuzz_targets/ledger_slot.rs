#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| snapshot::fuzz::ledger_slot(bytes));
