//! libFuzzer's entry point; what is checked is in `checks/packet.rs`, which the tests on stable replay too.
#![no_main]

#[path = "../checks/packet.rs"]
mod packet;

libfuzzer_sys::fuzz_target!(|data: &[u8]| packet::check(data));
