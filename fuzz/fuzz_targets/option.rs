#![no_main]
//! See `shunt_stack::fuzz::option`.
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| shunt_stack::fuzz::option(data));
