//! The endpoint's bench, in short.

use std::process::Command;

use serde_json::Value;

#[test]
fn the_endpoint_is_measured_with_and_without_super_packets_and_beside_open_connections() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shunt-bench"));
    let output = command.args("endpoint --seconds 1 --rounds 1 --idle 100 --json".split(' ')).output();
    let output = output.expect("it starts");
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}: {error}", output.status);
    let result: Value =
        serde_json::from_str(out.lines().last().unwrap_or_default()).expect("an object on the last line");
    for figure in ["send_gbps", "receive_gbps", "connections_per_s", "send_cpu_s_per_gb"] {
        for setting in ["offload", "offload_beside_open", "no_offload"] {
            let value = result[figure][setting].as_f64().unwrap_or(0.0);
            assert!(value > 0.0, "{figure}, {setting}: {result}");
        }
    }
    let super_packets = |setting: &str| result["send_cpu_s_per_gb"][setting].as_f64();
    assert!(super_packets("offload") < super_packets("no_offload"), "{result}");
    assert_eq!(result["open_connections"], 100);
    assert!(result["bytes_per_connection"].as_f64().is_some_and(|bytes| bytes > 1000.0), "{result}");
    assert!(error.contains("super-packets, 100 connections open"), "{error}");
}
