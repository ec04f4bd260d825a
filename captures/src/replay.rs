//! The loop of a replay: records in, rows out. Time is the capture's.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::Serialize;
use shunt_stack::device::Direction;
use shunt_stack::time::Instant;
use shunt_stack::wire::Packet;

use crate::describe::Summary;
use crate::frame::{Frame, FrameError};
use crate::read::{Record, Trouble};
use crate::role::{Outcome, Role};
use crate::row::{Decision, Row, Sent};
use crate::rules::violations;
use crate::track::Tracker;

/// Deadlines that may fall between two packets; more are let pass without a row.
const MAX_DEADLINES: usize = 1024;
/// Packets that replay sends and the capture has not shown yet, at most.
const MAX_EXPECTED: usize = 1024;

/// What a whole replay came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Records of the capture.
    pub packets: u64,
    /// Those that carry no IP packet.
    pub no_ip: u64,
    /// Those of which too little was captured.
    pub snapped: u64,
    /// Packets that are none, or whose headers cannot be read.
    pub unreadable: u64,
    /// Places of the file that cannot be read.
    pub troubles: u64,
    /// Packets whose time is before that of an earlier one.
    pub backwards: u64,
    /// Packets that the capture says were sent, and that the replay has sent as well.
    pub agree: u64,
    /// Those that it has not.
    pub differ: u64,
    /// Packets with something against a rule.
    pub violations: u64,
    /// Packets that the replay has sent.
    pub sent: u64,
    /// Packets that it has sent and that were left out of the comparison because there were too many.
    pub left_out: u64,
    /// Connections of a link that were too many to be remembered, the oldest.
    pub forgotten: u64,
    /// By what was decided.
    pub decisions: BTreeMap<String, u64>,
}

/// A replay under way.
pub struct Replay {
    role: Role,
    origin: Option<Duration>,
    now: Duration,
    /// What was sent and may be found in the capture.
    expected: VecDeque<Packet>,
    /// Whether the capture says which way packets went.
    directed: bool,
    tracker: Tracker,
    tally: Tally,
}

impl Replay {
    /// Through `role`.
    pub fn new(role: Role) -> Replay {
        let (expected, tally) = (VecDeque::new(), Tally::default());
        let tracker = Tracker::default();
        Replay { role, origin: None, now: Duration::ZERO, expected, directed: false, tracker, tally }
    }

    /// What it came to so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Whether the capture says which way packets went, and so was taken where one of the roles stands.
    pub fn is_directed(&self) -> bool {
        self.directed
    }

    /// What packets are replayed through.
    pub fn role(&self) -> &Role {
        &self.role
    }

    /// A place of the file that cannot be read.
    pub fn trouble(&mut self, trouble: &Trouble) -> Row {
        self.tally.troubles += 1;
        let mut row = self.row(Some(trouble.number));
        row.notes.push(trouble.to_string());
        row
    }

    /// Takes a record: what is due before it, then the record itself, each a row.
    pub fn record(&mut self, record: &Record, mut out: impl FnMut(Row)) {
        self.tally.packets += 1;
        if self.origin.is_none() {
            self.origin = Some(record.time);
        }
        let backwards = record.time < self.now;
        self.tally.backwards += u64::from(backwards);
        self.let_pass(record.time, &mut out);
        self.now = self.now.max(record.time);
        let mut row = self.row(Some(record.number));
        row.direction = record.direction;
        self.directed |= record.direction.is_some();
        if backwards {
            row.notes.push("its time is before that of an earlier packet".to_owned());
        }
        match Frame::read(record) {
            Ok(frame) => self.frame(frame, record.direction, &mut row),
            Err(error) => self.no_frame(error, record.direction, &mut row),
        }
        out(row);
    }

    fn row(&self, number: Option<u64>) -> Row {
        Row::new(number, self.now.saturating_sub(self.origin.unwrap_or(self.now)), self.now)
    }

    /// Lets time pass up to a packet's, with all that is due.
    fn let_pass(&mut self, until: Duration, out: &mut impl FnMut(Row)) {
        for _ in 0..MAX_DEADLINES {
            let Some(at) = self.role.poll_timeout().filter(|at| *at <= instant(until)) else { return };
            self.now = self.now.max(Duration::from_micros(at.micros()));
            let outcome = self.role.advance(instant(self.now));
            if outcome.decision.is_none() && outcome.sent.is_empty() {
                continue;
            }
            let mut row = self.row(None);
            self.take(outcome, &mut row);
            out(row);
        }
    }

    fn frame(&mut self, frame: Frame, direction: Option<Direction>, row: &mut Row) {
        let exid = self.role.exid();
        row.packet = Some(Summary::of(&frame.packet, exid));
        if frame.snapped > 0 {
            self.tally.snapped += 1;
            row.notes.push(format!("{} bytes of its end were not captured", frame.snapped));
        } else {
            let found = violations(&frame.packet, exid);
            row.notes.extend(found.iter().map(ToString::to_string));
            // Where ends are replayed, or both of their sides were captured, segments are not those of one link.
            let link = direction.is_none() && !self.role.decides();
            let sequence = if link { self.tracker.packet(&frame.packet, exid) } else { None };
            self.tally.forgotten = self.tracker.forgotten;
            row.notes.extend(sequence.map(|sequence| sequence.to_string()));
            self.tally.violations += u64::from(!found.is_empty() || sequence.is_some());
        }
        if direction == Some(Direction::Out) && self.role.decides() {
            self.compare(&frame.packet, row);
            return;
        }
        let outcome = self.role.packet(instant(self.now), frame.packet);
        self.take(outcome, row);
    }

    fn no_frame(&mut self, error: FrameError, direction: Option<Direction>, row: &mut Row) {
        match error {
            FrameError::Link(_) => self.tally.no_ip += 1,
            FrameError::Snapped { .. } => self.tally.snapped += 1,
            FrameError::Packet { .. } => self.tally.unreadable += 1,
        }
        row.notes.push(error.to_string());
        let FrameError::Packet { error, bytes } = error else { return };
        if direction == Some(Direction::Out) {
            return;
        }
        if let Ok(packet) = Packet::parse_opaque(bytes) {
            row.packet = Some(Summary::of(&packet, self.role.exid()));
            let outcome = self.role.unreadable(packet, error);
            self.take(outcome, row);
        }
    }

    fn take(&mut self, outcome: Outcome, row: &mut Row) {
        let exid = self.role.exid();
        if let Some(decision) = &outcome.decision {
            *self.tally.decisions.entry(decision.name.clone()).or_default() += 1;
        }
        row.decision = outcome.decision;
        for (towards, packet) in outcome.sent {
            self.tally.sent += 1;
            if self.directed {
                self.expect(packet.clone());
            }
            row.sent.push(Sent { towards, summary: Summary::of(&packet, exid), packet });
        }
    }

    fn expect(&mut self, packet: Packet) {
        if self.expected.len() == MAX_EXPECTED {
            self.expected.pop_front();
            self.tally.left_out += 1;
        }
        self.expected.push_back(packet);
    }

    /// A packet that whoever captured has sent: whether the replay has as well.
    fn compare(&mut self, packet: &Packet, row: &mut Row) {
        let found = self.expected.iter().position(|expected| expected.bytes() == packet.bytes());
        let name = if let Some(index) = found {
            self.expected.remove(index);
            self.tally.agree += 1;
            "as replayed"
        } else {
            self.tally.differ += 1;
            "not replayed"
        };
        row.decision = Some(Decision { name: name.to_owned(), rule: None, why: String::new() });
    }
}

/// Unix time as the machines' time.
fn instant(time: Duration) -> Instant {
    Instant::from_micros(u64::try_from(time.as_micros()).unwrap_or(u64::MAX))
}
