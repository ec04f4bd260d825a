//! Runs many worlds, one after the other or side by side, until one of them goes wrong.
fn main() {
    let seeds: u64 = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(10);
    let first: u64 = std::env::args().nth(2).and_then(|s| s.parse().ok()).unwrap_or(0);
    for seed in first..first + seeds {
        let options = shunt_sim::packets::Options::small(seed, None);
        let t = std::time::Instant::now();
        match shunt_sim::packets::run(&options, &shunt_sim::packets::capture_folder()) {
            Ok(s) => println!("{:?} {s:?}", t.elapsed()),
            Err(f) => println!("{:?} {f}", t.elapsed()),
        }
    }
}
