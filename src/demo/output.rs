//! What the demo says, and where: the story on standard output, progress on standard error.

use std::io::{IsTerminal as _, Write as _};

use indicatif::{ProgressBar, ProgressStyle};

/// Tells the story. With `--json` all of it goes to standard error, and standard output gets the result alone.
#[derive(Debug)]
pub(crate) struct Narrator {
    json: bool,
    terminal: bool,
    bar: Option<ProgressBar>,
    told: u64,
}

impl Narrator {
    /// For standard output and error as they are.
    pub(crate) fn new(json: bool) -> Self {
        Self { json, terminal: std::io::stderr().is_terminal(), bar: None, told: 0 }
    }

    /// Says something, one line or more. A reader who has gone is no reason to stop.
    pub(crate) fn say(&self, text: &str) {
        let write = || {
            let _ = if self.json {
                writeln!(std::io::stderr(), "{text}")
            } else {
                writeln!(std::io::stdout(), "{text}")
            };
        };
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// Shows how many of `total` connections have ended, and how many are open.
    pub(crate) fn progress(&mut self, ended: u64, open: u64, total: u64) {
        if self.terminal {
            let bar = self.bar.get_or_insert_with(|| {
                let style =
                    ProgressStyle::with_template("{elapsed:>4} {bar:40} {pos}/{len} connections, {msg}");
                ProgressBar::new(total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
            });
            bar.set_position(ended);
            bar.set_message(format!("{open} open"));
        } else if (ended * 10).checked_div(total) > (self.told * 10).checked_div(total) {
            self.told = ended;
            let _ = writeln!(std::io::stderr(), "   {ended} of {total} connections, {open} open");
        }
    }

    /// Takes the progress away.
    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// The result, with `--json`.
    pub(crate) fn result(&self, line: &str) {
        if self.json {
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    }
}
