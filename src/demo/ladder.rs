//! A ladder diagram of a handshake, for a terminal.

use std::fmt::Write as _;
use std::time::Duration;

/// Who is there, from left to right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// The client's own TCP.
    Client,
    /// The shim beside it.
    Shim,
    /// The network: balancer and servers.
    Network,
}

/// One segment on its way from one lane to its neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    /// Since the first one.
    pub(crate) at: Duration,
    pub(crate) from: Lane,
    pub(crate) to: Lane,
    /// What it is.
    pub(crate) text: String,
}

/// The inner widths of the two spaces between lanes.
const WIDTHS: [usize; 2] = [26, 39];
const TIME: usize = 10;

/// Draws the steps, one a line, under the lanes' names.
pub(crate) fn draw(names: [&str; 3], steps: &[Step]) -> String {
    let [left, middle, right] = names;
    let [w0, w1] = WIDTHS.map(|width| width + 1);
    let mut out = format!("{:TIME$}{left:<w0$}{middle:<w1$}{right}\n", "");
    for step in steps {
        let milliseconds = step.at.as_secs_f64() * 1000.0;
        let spaces = match (step.from, step.to) {
            (Lane::Client, _) => [arrow(&step.text, WIDTHS[0], true), blank(1)],
            (_, Lane::Client) => [arrow(&step.text, WIDTHS[0], false), blank(1)],
            (_, Lane::Network) => [blank(0), arrow(&step.text, WIDTHS[1], true)],
            (Lane::Network | Lane::Shim, Lane::Shim) => [blank(0), arrow(&step.text, WIDTHS[1], false)],
        };
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{milliseconds:6.2} ms │{}│{}│", spaces[0], spaces[1]);
    }
    out
}

fn blank(space: usize) -> String {
    " ".repeat(WIDTHS[space])
}

fn arrow(text: &str, width: usize, right: bool) -> String {
    let (head, tail) = if right { ("── ", "▶") } else { ("◀─ ", "─") };
    let used = head.chars().count() + text.chars().count() + 1 + tail.chars().count();
    let dashes = "─".repeat(width.saturating_sub(used));
    format!("{head}{text} {dashes}{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(from: Lane, to: Lane, text: &str) -> Step {
        Step { at: Duration::from_micros(1500), from, to, text: text.to_owned() }
    }

    #[test]
    fn every_line_has_its_lanes_in_the_same_columns() {
        let steps = [
            step(Lane::Client, Lane::Shim, "SYN 40000→80"),
            step(Lane::Shim, Lane::Network, "SYN 40000→80 [R C]"),
            step(Lane::Network, Lane::Shim, "SYN-ACK 80→40000 [C P=41001 O]"),
            step(Lane::Shim, Lane::Client, "SYN-ACK 80→40000"),
        ];
        let drawn = draw(["client", "shim", "network"], &steps);
        let columns = |line: &str| -> Vec<usize> {
            line.chars().enumerate().filter(|(_, c)| *c == '│').map(|(at, _)| at).collect()
        };
        let lines: Vec<&str> = drawn.lines().skip(1).collect();
        assert_eq!(lines.len(), 4);
        for line in &lines {
            assert_eq!(columns(line), [10, 37, 77], "{line}");
        }
        assert!(lines[0].contains("│── SYN 40000→80 ───"), "{drawn}");
        assert!(lines[2].contains("│◀─ SYN-ACK 80→40000 [C P=41001 O] ─"), "{drawn}");
        let header = drawn.lines().next().unwrap();
        assert_eq!(
            (header.find("client"), header.find("shim"), header.find("network")),
            (Some(10), Some(37), Some(77))
        );
    }

    #[test]
    fn a_text_that_is_too_long_does_not_panic() {
        let drawn = draw(["a", "b", "c"], &[step(Lane::Client, Lane::Shim, &"x".repeat(200))]);
        assert!(drawn.contains("xxx"));
    }
}
