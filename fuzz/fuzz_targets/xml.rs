//! libFuzzer's entry point; what is checked is in `checks/xml.rs`, which the tests on stable replay too.
#![no_main]

#[path = "../checks/xml.rs"]
mod xml;

libfuzzer_sys::fuzz_target!(|data: &[u8]| xml::check(data));
