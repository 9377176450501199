//! libFuzzer's entry point; what is checked is in `checks/rules_file.rs`, which the tests on stable replay too.
#![no_main]

#[path = "../checks/rules_file.rs"]
mod rules_file;

libfuzzer_sys::fuzz_target!(|data: &[u8]| rules_file::check(data));
