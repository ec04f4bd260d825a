#![no_main]
//! See `shunt_balancer::fuzz::control`.
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| shunt_balancer::fuzz::control(data));
