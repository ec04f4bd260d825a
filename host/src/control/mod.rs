//! Talking to a running daemon: a Unix stream socket with one JSON object a line each way.
//!
//! A request is an object with a `command`; each is answered by any number of `{"progress": ...}` lines and then one
//! `{"done": ...}` or `{"error": "a sentence"}`. Requests of one connection are answered in order. [`Server`] is a
//! daemon's end: it hands [`Call`]s to the run loop, which knows what they mean. [`Client`] is the other end.
//!
//! Everything is bounded: lines, connections, and the time a connection may be silent or not take its answers.

mod client;
mod options;
mod server;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use client::{Client, ClientError};
pub use options::{ControlOptions, ControlSettings, default_socket};
pub use server::{Call, ControlError, Reply, Server};

/// The longest request, in bytes with its newline.
pub const MAX_REQUEST: usize = 64 << 10;
/// The longest answer that a [`Client`] takes: more than 60,000 servers need.
pub const MAX_ANSWER: usize = 64 << 20;

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// How far a long operation is; more follows.
    Progress(Value),
    /// Done: what came of it. The last line.
    Done(Value),
    /// Refused or failed, and nothing was changed; why, in a sentence. The last line.
    Error(String),
}

impl Answer {
    /// Whether it is the last line of an answer.
    pub fn is_last(&self) -> bool {
        !matches!(self, Answer::Progress(_))
    }
}

/// Reads a request, an object whose `command` names it.
///
/// # Errors
/// A sentence for whoever sent it.
pub fn parse<T: DeserializeOwned>(line: &str) -> Result<T, String> {
    serde_json::from_str(line).map_err(|error| {
        let error = error.to_string();
        // There is one line.
        let reason = error.split(" at line ").next().unwrap_or(&error);
        format!("this is no request of this daemon ({reason}): write one object a line, with a `command`")
    })
}

/// The numbers of a JSON value as counters of Prometheus' text format, named by their way from the root: `prefix_a_b`.
pub fn prometheus(prefix: &str, value: &Value) -> String {
    let mut text = String::new();
    flatten(prefix, value, &mut text);
    text
}

fn flatten(name: &str, value: &Value, text: &mut String) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                flatten(&format!("{name}_{key}"), value, text);
            }
        }
        Value::Number(number) => {
            let _ = writeln!(text, "# TYPE {name}_total counter\n{name}_total {number}");
        }
        Value::Null | Value::Bool(_) | Value::String(_) | Value::Array(_) => {}
    }
}
