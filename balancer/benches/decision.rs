//! How long a packet takes: `cargo bench --bench decision`, or `benches/run.sh` with the instructions beside it.

#[path = "cases/mod.rs"]
mod cases;

use std::hint::black_box;
use std::time::{Duration, Instant};

use cases::{Meter, NOW, Version, balancer, route_and_forward};
use criterion::{Criterion, criterion_group, criterion_main};
use shunt_balancer::Memory;
use shunt_stack::wire::Packet;

/// Packets that are made at once, outside of the measured time; they stay in the nearest caches.
const CHUNK: u32 = 64;
/// Flows that a balancer has seen before it is measured again.
const FLOWS: u32 = 10_000_000;

struct Timed<'a>(&'a mut Criterion);

impl Meter for Timed<'_> {
    fn measure<I>(&mut self, name: &str, mut prepare: impl FnMut(u32) -> I, mut step: impl FnMut(&mut I)) {
        self.0.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let (mut left, mut next, mut time) = (iterations, 0u32, Duration::ZERO);
                let mut inputs = Vec::with_capacity(CHUNK as usize);
                while left > 0 {
                    let count = left.min(u64::from(CHUNK));
                    inputs.clear();
                    inputs.extend((0..count).map(|_| {
                        next = next.wrapping_add(1);
                        prepare(next)
                    }));
                    let begin = Instant::now();
                    for input in &mut inputs {
                        step(input);
                    }
                    time += begin.elapsed();
                    left -= count;
                }
                time
            });
        });
    }
}

fn steps(criterion: &mut Criterion) {
    cases::all(&mut Timed(criterion));
}

/// The same balancer before and after it has seen ten million connections begin and go on.
fn flows(criterion: &mut Criterion) {
    let balancer = balancer();
    let version = Version::V4;
    let step = |packet: &mut Packet| {
        black_box(route_and_forward(&balancer, black_box(packet)));
    };
    let name = |flows: u32| format!("IPv4: route, forward after {flows} flows");
    Timed(criterion).measure(&name(0), |flow| version.established(flow), step);
    let (mut memory, mut forwarded) = (Memory::new(&balancer), 0u64);
    for flow in 0..FLOWS {
        for mut packet in [version.asking_syn(flow), version.established(flow)] {
            forwarded += u64::from(balancer.handle(&mut memory, NOW, &mut packet).is_ok());
        }
    }
    assert_eq!(forwarded, 2 * u64::from(FLOWS), "every packet is forwarded");
    // Any of the flows, not the last ones.
    let any = |number: u32| version.established(number.wrapping_mul(2_654_435_761) % FLOWS);
    Timed(criterion).measure(&name(FLOWS), any, step);
}

criterion_group!(benches, steps, flows);
criterion_main!(benches);
