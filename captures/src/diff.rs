//! Comparing what replay prints with what it is expected to print, line by line, in bounded memory.

use std::io::{self, BufRead};

use similar::TextDiff;

/// Lines that are shown from the first that differs on.
const SHOWN: usize = 20;
/// The longest line that is compared as a whole; what is longer was written by nothing of ours.
const LONGEST: u64 = 1 << 20;

/// A comparison under way.
pub struct Comparison<R> {
    expected: R,
    line: u64,
    /// The number of the first line that differs, and the lines from there on: expected, and printed.
    difference: Option<(u64, Vec<String>, Vec<String>)>,
}

impl<R: BufRead> Comparison<R> {
    /// With what is expected.
    pub fn new(expected: R) -> Comparison<R> {
        Comparison { expected, line: 0, difference: None }
    }

    /// Takes the next line that was printed, without its end.
    ///
    /// # Errors
    /// What is expected cannot be read.
    pub fn line(&mut self, printed: &str) -> io::Result<()> {
        self.line += 1;
        if self.is_over() {
            return Ok(());
        }
        let expected = self.read()?;
        match &mut self.difference {
            None if expected.as_deref() == Some(printed) => {}
            None => {
                let expected = expected.into_iter().collect();
                self.difference = Some((self.line, expected, vec![printed.to_owned()]));
            }
            Some((_, old, new)) => {
                old.extend(expected);
                new.push(printed.to_owned());
            }
        }
        Ok(())
    }

    /// Whether enough differs for all that [`finish`](Self::finish) says.
    pub fn is_over(&self) -> bool {
        self.difference.as_ref().is_some_and(|(_, _, new)| new.len() >= SHOWN)
    }

    /// After the last line: the first lines that differ, in the form of `diff -u`; `None` if none does.
    ///
    /// # Errors
    /// What is expected cannot be read.
    pub fn finish(mut self) -> io::Result<Option<String>> {
        if self.difference.is_none() {
            let Some(rest) = self.read()? else { return Ok(None) };
            self.difference = Some((self.line + 1, vec![rest], Vec::new()));
        }
        while self.difference.as_ref().is_some_and(|(_, old, _)| old.len() < SHOWN) {
            let Some(line) = self.read()? else { break };
            if let Some((_, old, _)) = &mut self.difference {
                old.push(line);
            }
        }
        Ok(self.difference.map(|(line, old, new)| {
            let text =
                |lines: &[String]| lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect::<String>();
            let (old, new) = (text(&old), text(&new));
            let diff = TextDiff::from_lines(&old, &new);
            format!(
                "the first difference is in line {line}\n{}",
                diff.unified_diff().header("expected", "replayed")
            )
        }))
    }

    fn read(&mut self) -> io::Result<Option<String>> {
        let mut line = String::new();
        if io::Read::take(&mut self.expected, LONGEST).read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let without_end = line.strip_suffix('\n').map(|line| line.strip_suffix('\r').unwrap_or(line));
        Ok(Some(without_end.unwrap_or(&line).to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(expected: &str, printed: &[&str]) -> Option<String> {
        let mut comparison = Comparison::new(expected.as_bytes());
        for line in printed {
            comparison.line(line).unwrap();
        }
        comparison.finish().unwrap()
    }

    #[test]
    fn the_same_lines_do_not_differ() {
        assert_eq!(compared("a\nb\n", &["a", "b"]), None);
        assert_eq!(compared("a\r\nb", &["a", "b"]), None);
        assert_eq!(compared("", &[]), None);
    }

    #[test]
    fn the_first_line_that_differs_is_shown() {
        let difference = compared("a\nb\nc\n", &["a", "x", "c"]).unwrap();
        assert!(difference.contains("line 2") && difference.contains("-b\n+x\n c"), "{difference}");
        let missing = compared("a\nb\n", &["a"]).unwrap();
        assert!(missing.contains("line 2") && missing.contains("-b"), "{missing}");
        let more = compared("a\n", &["a", "b"]).unwrap();
        assert!(more.contains("line 2") && more.contains("+b"), "{more}");
    }

    #[test]
    fn a_long_difference_is_cut() {
        let expected = "a line\n".repeat(1000);
        let difference = compared(&expected, &["x"; 1000]).unwrap();
        assert!(difference.lines().count() <= 2 * SHOWN + 4, "{difference}");
    }
}
