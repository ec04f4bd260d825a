//! The whole bench, in short: real programs in real namespaces.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn bench(arguments: &[&str], folder: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shunt-bench"));
    command.args(arguments).arg("--write").arg(folder);
    command.output().expect("it starts")
}

#[test]
fn two_contestants_are_measured_beside_the_direct_link() {
    let folder = tempfile::tempdir().expect("a folder");
    let arguments = "--only nft --only haproxy --measure streams --measure latency --seconds 1 --rounds 1 --connections 0,64 --json";
    let output = bench(&arguments.split(' ').collect::<Vec<_>>(), folder.path());
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}: {error}", output.status);

    let result: Value =
        serde_json::from_str(out.lines().last().unwrap_or_default()).expect("an object on the last line");
    for contestant in ["direct", "nft", "haproxy"] {
        let rate = result["throughput_gbps"][contestant].as_f64().unwrap_or(0.0);
        assert!(rate > 0.01, "{contestant}: {result}");
    }
    // One round of a second on a busy machine may make anything of it.
    assert!(result["p50_added_us"]["haproxy"].is_f64(), "{result}");
    assert!(result["p50_added_us"].get("direct").is_none(), "{result}");
    assert!(result["throughput_gbps"].get("shunt").is_none(), "it was not asked for: {result}");
    assert_eq!(result["failures"], serde_json::json!([]));

    let document = std::fs::read_to_string(folder.path().join("RESULTS.md")).expect("the document");
    let memory = document.lines().rev().find(|line| line.starts_with("| haproxy")).expect("a row of memory");
    let kilobytes: Vec<u64> = memory.split('|').filter_map(|cell| cell.trim().parse().ok()).collect();
    assert!(kilobytes.len() == 2 && kilobytes[0] > 1000 && kilobytes[1] > kilobytes[0], "{memory}");
    let picture = std::fs::read_to_string(folder.path().join("results.svg")).expect("the picture");
    assert!(picture.contains("haproxy"));
}

#[test]
fn what_cannot_be_measured_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let arguments = ["--only", "shunt", "--shunt", "/bin/false"];
    let output = bench(&arguments, folder.path());
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("/bin/false does not take the configuration"), "{error}");
    assert!(!folder.path().join("RESULTS.md").exists());
}
