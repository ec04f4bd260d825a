//! The document of a run.

use std::fmt::Write as _;

use crate::figure::Figure;
use crate::report::table;
use crate::results::Results;

/// Tables and what is to be known with them, as Markdown that can be read as it is; `machine` is described in lines.
pub fn document(results: &Results, machine: &[String]) -> String {
    let mut text = String::new();
    for line in machine {
        let _ = writeln!(text, "- {line}");
    }
    text.push('\n');
    for contestant in results.contestants() {
        let _ = writeln!(text, "- `{}`: {}", contestant.name(), contestant.about());
    }
    let rounds = results.rounds();
    if rounds > 0 {
        let _ = writeln!(
            text,
            "\nMedian (least..greatest) of {rounds} rounds, in each of which everyone was measured in turn. Behind rates is \
             their part of\nkernel's in the same round, with an agent of direct's. What is added is added to `direct` in the same round, whose own \
             figure stands in brackets;\nCPU time is that of the whole machine."
        );
    }
    let (added, rates): (Vec<Figure>, Vec<Figure>) =
        results.figures().into_iter().partition(|figure| figure.is_added());
    // So wide as a screen.
    for figures in rates.chunks(3).chain(added.chunks(3)) {
        let _ = write!(text, "\n{}\n", table::figures(results, figures));
    }
    if !results.memory_counts().is_empty() {
        let _ = write!(
            text,
            "\nResident memory of the processes in the middle with so many open connections:\n\n{}\n",
            table::memory(results)
        );
    }
    let left_out = results.left_out.iter().map(|(one, why)| format!("left out: {}: {why}", one.name()));
    let failed = results.failures.iter().map(|failure| format!("failed: {failure}"));
    for (number, line) in left_out.chain(results.remarks.iter().cloned()).chain(failed).enumerate() {
        let _ = writeln!(text, "{}- {line}", if number == 0 { "\n" } else { "" });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::example;

    #[test]
    fn everything_that_is_known_is_told() {
        let mut results = example();
        results.remarks.push("a remark".to_owned());
        results.failures.push("haproxy, streams: no".to_owned());
        let text = document(&results, &["processors: 2".to_owned()]);
        for line in [
            "- processors: 2",
            "of 2 rounds",
            "- left out: nginx: nginx <has> no module stream",
            "- a remark",
            "- failed: haproxy, streams: no",
            "0.65x",
            "10000 connections, KiB",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }
}
