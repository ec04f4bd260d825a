//! HTTP requests.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::addresses::Service;
use crate::world::World;

/// How much longer than asked for wrk may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// What was answered.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Done {
    /// Requests a second.
    pub per_second: f64,
    /// All of them.
    pub requests: f64,
}

/// Asks for `time` over 64 connections at once: the same ones, or with `keep` not set a new one each time.
///
/// # Errors
/// wrk fails, or an answer is not a good one.
pub fn run(world: &World, time: Duration, keep: bool) -> Result<Done> {
    let target = Service::Web.target(world.contestant);
    let mut command = Command::new("wrk");
    command.args(["-t", "2", "-c", "64", "-d", &time.as_secs().max(1).to_string()]);
    if !keep {
        command.args(["-H", "Connection: close"]);
    }
    command.arg(format!("http://{target}/"));
    let output = world.client.run_within(&mut command, time + PATIENCE)?;
    parse(&String::from_utf8_lossy(&output.stdout))
}

fn parse(text: &str) -> Result<Done> {
    if let Some(line) = text
        .lines()
        .map(str::trim)
        .find(|line| line.starts_with("Non-2xx") || line.starts_with("Socket errors"))
    {
        bail!("wrk: {line}");
    }
    let number = |word: Option<&str>| word.and_then(|word| word.parse::<f64>().ok());
    let per_second = text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"));
    let requests = text.lines().find(|line| line.contains(" requests in "));
    let per_second = number(per_second.map(str::trim)).context("wrk tells no requests a second")?;
    let requests = number(requests.and_then(|line| line.split_whitespace().next()));
    match requests.context("wrk tells no number of requests")? {
        requests if requests > 0.0 => Ok(Done { per_second, requests }),
        _ => bail!("wrk had no answer"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "Running 1s test @ http://127.0.0.1/
  2 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.04ms    1.20ms  15.00ms   90.00%
  25050 requests in 1.10s, 20.00MB read
Requests/sec:  22772.72
Transfer/sec:     18.10MB
";

    #[test]
    fn the_totals_are_read() {
        assert_eq!(parse(GOOD).unwrap(), Done { per_second: 22772.72, requests: 25050.0 });
    }

    #[test]
    fn a_bad_answer_spoils_the_run() {
        for line in
            ["  Non-2xx or 3xx responses: 3", "  Socket errors: connect 0, read 1, write 0, timeout 0"]
        {
            let text = format!("{GOOD}{line}\n");
            assert!(parse(&text).unwrap_err().to_string().contains(line.trim()));
        }
        assert!(parse("unable to connect to 127.0.0.1:80 Connection refused").is_err());
        assert!(parse("  0 requests in 1.10s, 0.00B read\nRequests/sec:      0.00\n").is_err());
    }
}
