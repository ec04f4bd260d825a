//! Bulk transfers.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::addresses::Service;
use crate::world::World;

/// How much longer than asked for iperf3 may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// What was moved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moved {
    /// As the receiver counted.
    pub gigabits_per_second: f64,
    /// 10^9 bytes.
    pub gigabytes: f64,
}

/// Moves as much as goes in `time`, from the server to the client if `reverse`.
///
/// # Errors
/// iperf3 fails, or nothing arrives.
pub fn run(world: &World, time: Duration, streams: u32, reverse: bool) -> Result<Moved> {
    let target = Service::Iperf.target(world.contestant);
    let mut command = Command::new("iperf3");
    command.args(["-J", "-c", &target.ip().to_string(), "-p", &target.port().to_string()]);
    command.args(["-t", &time.as_secs().max(1).to_string(), "-P", &streams.to_string()]);
    if reverse {
        command.arg("-R");
    }
    let output = world.client.run_within(&mut command, time + PATIENCE)?;
    parse(&String::from_utf8_lossy(&output.stdout))
}

fn parse(text: &str) -> Result<Moved> {
    let report: Value = serde_json::from_str(text).context("reading what iperf3 reports")?;
    if let Some(error) = report.get("error") {
        bail!("iperf3: {error}");
    }
    let received = &report["end"]["sum_received"];
    match (received["bits_per_second"].as_f64(), received["bytes"].as_f64()) {
        (Some(rate), Some(bytes)) if bytes > 0.0 => {
            Ok(Moved { gigabits_per_second: rate / 1e9, gigabytes: bytes / 1e9 })
        }
        _ => bail!("iperf3 reports that nothing was received"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receivers_figures_count() {
        let text = r#"{"end": {"sum_sent": {"bytes": 9, "bits_per_second": 9.0},
            "sum_received": {"bytes": 2500000000, "bits_per_second": 10000000000.0}}}"#;
        assert_eq!(parse(text).unwrap(), Moved { gigabits_per_second: 10.0, gigabytes: 2.5 });
    }

    #[test]
    fn an_error_is_told() {
        let error = parse(r#"{"end": {}, "error": "unable to connect"}"#).unwrap_err();
        assert!(error.to_string().contains("unable to connect"));
        for text in ["", "{}", r#"{"end": {"sum_received": {"bytes": 0, "bits_per_second": 0}}}"#] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
