#![no_main]
//! See `shunt_captures::fuzz::replay`.
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| shunt_captures::fuzz::replay(data));
