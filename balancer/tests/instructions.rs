//! How many instructions a packet takes, as callgrind counts them: the same on a busy machine, so that a test can hold
//! the balancer to it. `benches/run.sh` prints the table.

#[path = "../benches/cases/mod.rs"]
mod cases;

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use cases::Meter;

/// Where the counted run of this program writes the cases' names; unset in the run that is the test.
const NAMES: &str = "SHUNT_INSTRUCTIONS";
/// This test.
const TEST: &str = "packets_take_no_more_instructions_than_promised";
/// Steps of each case.
const STEPS: u32 = 1000;

/// The most instructions a packet may take: 150 of a segment to a service port are promised, the others are what they
/// were measured at and a little more.
const PROMISED: [(&str, u64); 4] = [
    ("IPv4: route, forward", 150),
    ("IPv6: route, forward", 240),
    ("IPv4: parse, route, forward", 400),
    ("IPv4: SYN with R: route, forward", 1300),
];

/// Under callgrind: what [`counted_under_callgrind`] takes is dumped to a file of its own for each case.
struct Counted(File);

impl Meter for Counted {
    fn measure<I>(&mut self, name: &str, prepare: impl FnMut(u32) -> I, mut step: impl FnMut(&mut I)) {
        let mut inputs: Vec<I> = (1..=STEPS).map(prepare).collect();
        counted_from_here();
        counted_under_callgrind(&mut inputs, &mut step);
        writeln!(self.0, "{name}").expect("the names can be written");
    }
}

#[inline(never)]
fn counted_from_here() {
    std::hint::black_box(());
}

#[inline(never)]
fn counted_under_callgrind<I>(inputs: &mut [I], step: &mut impl FnMut(&mut I)) {
    for input in inputs {
        step(input);
    }
}

/// Instructions a step, by case.
fn count(folder: &Path) -> Vec<(String, u64)> {
    let (names, out) = (folder.join("names"), folder.join("out"));
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--zero-before=*counted_from_here*"])
        .arg("--dump-after=*counted_under_callgrind*")
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", TEST, "--nocapture"])
        .env(NAMES, &names)
        .output()
        .expect("valgrind starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let names = std::fs::read_to_string(names).unwrap();
    let instructions = |number: usize| {
        let text = std::fs::read_to_string(folder.join(format!("out.{number}"))).unwrap();
        let totals = text.lines().find_map(|line| line.strip_prefix("totals: "));
        let total: u64 = totals.expect("callgrind says what it counted").trim().parse().unwrap();
        total.div_ceil(u64::from(STEPS))
    };
    // The first does nothing: what it takes is the loop.
    let all = names.lines().enumerate().skip(1);
    all.map(|(index, name)| (name.to_owned(), instructions(index + 1) - instructions(1))).collect()
}

#[test]
fn packets_take_no_more_instructions_than_promised() {
    if let Some(names) = std::env::var_os(NAMES) {
        let mut meter = Counted(File::create(names).unwrap());
        meter.measure(
            "nothing",
            |flow| flow,
            |flow| {
                std::hint::black_box(flow);
            },
        );
        return cases::all(&mut meter);
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        // To those who are told nothing of a test that passes, too.
        let _ = writeln!(
            std::io::stderr(),
            "NOT TESTED: valgrind is missing, which counts instructions: apt-get install valgrind"
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let counts = count(folder.path());
    for (name, instructions) in &counts {
        println!("{instructions:>8}  {name}");
    }
    if cfg!(debug_assertions) {
        let _ = writeln!(std::io::stderr(), "NOT TESTED: the promises are about builds with --release");
        return;
    }
    for (name, most) in PROMISED {
        let (_, instructions) = counts.iter().find(|(case, _)| case == name).expect("the case is counted");
        assert!(*instructions <= most, "{name}: {instructions} instructions, {most} are promised");
    }
}
