//! What replay says of a packet, as text and as JSON.

use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};
use shunt_balancer::Explanation;
use shunt_stack::device::Direction;
use shunt_stack::wire::Packet;

use crate::describe::Summary;

/// Where packets are sent to that leave a host by its routes.
pub(crate) const NETWORK: &str = "network";

/// What was decided about a packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// The name under which the role counts it: `selected`, `plain_unconfirmed`.
    pub name: String,
    /// The rule of PROTOCOL.md.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<&'static str>,
    /// More about it; may be empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub why: String,
}

impl From<Explanation> for Decision {
    fn from(explanation: Explanation) -> Decision {
        let Explanation { name, rule, why } = explanation;
        Decision { name: name.to_owned(), rule: Some(rule), why }
    }
}

/// A packet that would have been sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sent {
    /// Where to: `network`, `local TCP`, or a server's device.
    pub towards: String,
    /// What it is.
    #[serde(flatten)]
    pub summary: Summary,
    /// The packet.
    #[serde(skip)]
    pub packet: Packet,
}

/// All about one packet of a capture, or about a timer between two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The packet's number in the file; none for a timer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u64>,
    /// Since the capture's first packet; in JSON seconds.
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
    /// Since 1970.
    #[serde(skip)]
    pub at: Duration,
    /// Which way it went from the view of who captured it.
    #[serde(serialize_with = "direction", skip_serializing_if = "Option::is_none")]
    pub direction: Option<Direction>,
    /// What it is, if it is a packet that can be read.
    #[serde(flatten)]
    pub packet: Option<Summary>,
    /// What was decided, if anything was to decide.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decision: Option<Decision>,
    /// What would have been sent.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sent: Vec<Sent>,
    /// What is wrong with it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

fn seconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

// serde asks for a reference to the field as it is.
#[allow(clippy::ref_option, clippy::trivially_copy_pass_by_ref)]
fn direction<S: Serializer>(direction: &Option<Direction>, serializer: S) -> Result<S::Ok, S::Error> {
    match direction {
        Some(direction) => serializer.serialize_str(word(*direction)),
        None => serializer.serialize_none(),
    }
}

fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::In => "in",
        Direction::Out => "out",
    }
}

impl Row {
    /// A row without packet or decision.
    pub(crate) fn new(number: Option<u64>, time: Duration, at: Duration) -> Row {
        let (sent, notes) = (Vec::new(), Vec::new());
        Row { number, time, at, direction: None, packet: None, decision: None, sent, notes }
    }

    /// As one line of JSON.
    pub fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
    }
}

/// One line.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            Some(number) => write!(f, "{number:>6}")?,
            None => write!(f, "{:>6}", "-")?,
        }
        write!(f, " {:>11.6}", self.time.as_secs_f64())?;
        if let Some(direction) = self.direction {
            write!(f, " {:<3}", word(direction))?;
        }
        match &self.packet {
            Some(packet) => {
                write!(f, " {}", packet.line())?;
                if let Some(message) = packet.message {
                    write!(f, " ({message})")?;
                }
            }
            None if self.number.is_none() => write!(f, " timer")?,
            None => {}
        }
        if let Some(decision) = &self.decision {
            write!(f, " | {decision}")?;
        }
        for sent in &self.sent {
            write!(f, " | to {}: {}", sent.towards, sent.summary.line())?;
        }
        self.notes.iter().try_for_each(|note| write!(f, " | ! {note}"))
    }
}

/// Name, rule and why: `selected (B1): server web-1`.
impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if let Some(rule) = self.rule {
            write!(f, " ({rule})")?;
        }
        if self.why.is_empty() { Ok(()) } else { write!(f, ": {}", self.why) }
    }
}
