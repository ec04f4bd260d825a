//! Ladder diagrams of connections: the client on the left, the ports it meets beside it in the order it meets them.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::describe::Summary;
use crate::row::{NETWORK, Row};

/// Connections drawn, at most.
const MAX_CONVERSATIONS: usize = 200;
/// Connections and the ports they move to that are told apart, at most.
const MAX_NAMES: usize = 4096;
/// Arrows of a connection, at most.
const MAX_ARROWS: usize = 200;
/// Ports of a connection that have a column, at most; further ones share the last.
const MAX_COLUMNS: usize = 6;
/// Segments with data that are drawn of a connection; further ones only count.
const DATA_DRAWN: usize = 2;

/// The shortest and the longest space between two columns, in characters.
const SPACE: [usize; 2] = [20, 44];
/// Characters in front of the first column.
const TIME: usize = 12;

/// One arrow, or a number of segments that were not drawn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Arrow {
    pub(crate) at: Duration,
    /// The column at its other end, from 1; the client's is 0.
    pub(crate) column: usize,
    /// Whether it comes from the client.
    pub(crate) up: bool,
    pub(crate) label: String,
    /// What was decided.
    pub(crate) note: String,
    /// If not 0, it stands for so many segments.
    pub(crate) skipped: u64,
}

/// A connection and what it has become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Conversation {
    pub(crate) client: SocketAddr,
    pub(crate) peer: IpAddr,
    pub(crate) ports: Vec<u16>,
    pub(crate) arrows: Vec<Arrow>,
    data: usize,
    left_out: u64,
}

/// What the network calls a connection: the client, and the address it talks to.
type Name = (SocketAddr, IpAddr);

/// Diagrams in the making.
#[derive(Debug, Default)]
pub struct Ladder {
    conversations: Vec<Conversation>,
    names: HashMap<Name, usize>,
    /// (client address, peer, port it is on, port it is to go to): announced moves (§4).
    moves: HashMap<(IpAddr, IpAddr, u16, u16), usize>,
    left_out: u64,
}

impl Ladder {
    /// Nothing yet.
    pub fn new() -> Ladder {
        Ladder::default()
    }

    /// Takes what replay says of a packet.
    pub fn row(&mut self, row: &Row) {
        let decision = row.decision.as_ref();
        if decision.is_some_and(|decision| matches!(decision.name.as_str(), "as replayed" | "not replayed")) {
            return;
        }
        // What merely passes needs no word.
        let told = decision.filter(|decision| decision.name != "passed" || !decision.why.is_empty());
        let mut notes: Vec<String> = told.map(ToString::to_string).into_iter().collect();
        notes.extend(row.notes.iter().map(|note| format!("! {note}")));
        let mut note = Some(notes.join(" "));
        let mut draw = |summary: &Summary| self.arrow(row.time, summary, note.take().unwrap_or_default());
        let seen = row.packet.as_ref();
        let sent = || row.sent.iter().filter(|sent| sent.towards == NETWORK).map(|sent| &sent.summary);
        // What the client's network sees is drawn. What is passed on towards the same end is it, and not what came;
        // towards a server whose address was written into it, it is what came.
        let passes_on = |sent: &Summary| seen.is_some_and(|seen| seen.destination == sent.destination);
        let to_server = |sent: &Summary| seen.is_some_and(|seen| seen.source == sent.source);
        if let Some(seen) = seen.filter(|_| !sent().any(passes_on)) {
            draw(seen);
        }
        for summary in sent().filter(|sent| passes_on(sent) || !to_server(sent)) {
            draw(summary);
        }
    }

    fn arrow(&mut self, at: Duration, packet: &Summary, note: String) {
        let (Some(from), Some(to)) = (packet.source_port, packet.destination_port) else { return };
        let source = SocketAddr::new(packet.source, from);
        let destination = SocketAddr::new(packet.destination, to);
        let Some((index, up)) = self.find(packet, source, destination) else { return };
        let (client, peer) = if up { (source, destination) } else { (destination, source) };
        let conversation = &mut self.conversations[index];
        conversation.draw(at, client, peer.port(), up, packet, note);
        self.follow(index, packet, client, peer);
    }

    /// The connection that a segment belongs to, and whether it comes from the client.
    fn find(
        &mut self,
        packet: &Summary,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> Option<(usize, bool)> {
        if let Some(index) = self.names.get(&(source, destination.ip())) {
            return Some((*index, true));
        }
        if let Some(index) = self.names.get(&(destination, source.ip())) {
            return Some((*index, false));
        }
        // Who sends the first SYN is the client; of a connection without one, who uses the higher port.
        let up = match packet.what.as_str() {
            "SYN" => true,
            "SYN-ACK" => false,
            _ => source.port() >= destination.port(),
        };
        let (client, peer) = if up { (source, destination) } else { (destination, source) };
        let moved = moved_from(packet)
            .and_then(|from| self.moves.get(&(client.ip(), peer.ip(), from, peer.port())).copied());
        if moved.is_none() && self.conversations.len() == MAX_CONVERSATIONS || self.names.len() >= MAX_NAMES {
            self.left_out += 1;
            return None;
        }
        let index = moved.unwrap_or(self.conversations.len());
        if moved.is_none() {
            let (ports, arrows) = (Vec::new(), Vec::new());
            let (client, peer) = (client, peer.ip());
            self.conversations.push(Conversation { client, peer, ports, arrows, data: 0, left_out: 0 });
        }
        self.names.insert((client, peer.ip()), index);
        Some((index, up))
    }

    /// Notes under which names the connection may go on (§4, §5).
    fn follow(&mut self, index: usize, packet: &Summary, client: SocketAddr, peer: SocketAddr) {
        let announces = packet.message == Some("redirection of an established connection");
        let Some(port) = port_of(packet).filter(|_| announces) else { return };
        if self.names.len() + self.moves.len() >= MAX_NAMES {
            self.left_out += 1;
        } else if packet.source == peer.ip() {
            self.moves.insert((client.ip(), peer.ip(), peer.port(), port), index);
        } else {
            self.names.entry((SocketAddr::new(client.ip(), port), peer.ip())).or_insert(index);
        }
    }

    pub(crate) fn conversations(&self) -> &[Conversation] {
        &self.conversations
    }

    /// What is not drawn because there was too much of it; empty if all is.
    pub(crate) fn left_out(&self) -> String {
        match self.left_out {
            0 => String::new(),
            segments => format!("{segments} segments of further connections are not drawn"),
        }
    }

    /// The diagrams as text for a terminal.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for conversation in &self.conversations {
            conversation.text(&mut out);
            out.push('\n');
        }
        let left_out = self.left_out();
        if left_out.is_empty() { out } else { out + &left_out + "\n" }
    }
}

/// The port of an option as it is described.
fn port_of(packet: &Summary) -> Option<u16> {
    let parts = packet.option.as_deref()?.split(' ');
    parts.into_iter().find_map(|part| part.strip_prefix("P=")).and_then(|port| port.parse().ok())
}

/// The port that an opening SYN says it comes from.
fn moved_from(packet: &Summary) -> Option<u16> {
    port_of(packet).filter(|_| packet.message == Some("opening SYN of a moved connection"))
}

impl Conversation {
    fn column(&mut self, port: u16) -> usize {
        if let Some(index) = self.ports.iter().position(|known| *known == port) {
            return index + 1;
        }
        if self.ports.len() < MAX_COLUMNS {
            self.ports.push(port);
        }
        self.ports.len()
    }

    fn draw(
        &mut self,
        at: Duration,
        client: SocketAddr,
        port: u16,
        up: bool,
        packet: &Summary,
        note: String,
    ) {
        let column = self.column(port);
        let signals = ["SYN", "FIN", "RST"].iter().any(|flag| packet.what.contains(flag));
        let carries = packet.what.ends_with("bytes");
        self.data += usize::from(carries && packet.option.is_none());
        let drawn = signals || packet.option.is_some() || note.contains("! ") || self.data <= DATA_DRAWN;
        if !drawn || self.arrows.len() >= MAX_ARROWS {
            let full = self.arrows.len() >= MAX_ARROWS;
            match self.arrows.last_mut().filter(|last| last.skipped > 0) {
                Some(last) => last.skipped += 1,
                None if full => self.left_out += 1,
                None => {
                    let (label, note) = (String::new(), String::new());
                    self.arrows.push(Arrow { at, column, up, label, note, skipped: 1 });
                }
            }
            return;
        }
        let mut label = packet.label();
        if client.port() != self.client.port() {
            label = format!(":{} {label}", client.port());
        }
        self.arrows.push(Arrow { at, column, up, label, note, skipped: 0 });
    }

    /// What its columns are called.
    pub(crate) fn headers(&self) -> Vec<String> {
        let names = ["X", "Y", "Z"];
        let name = |(index, port): (usize, &u16)| match names.get(index) {
            Some(name) => format!("{name} :{port}"),
            None => format!(":{port}"),
        };
        let client = format!("client :{}", self.client.port());
        std::iter::once(client).chain(self.ports.iter().enumerate().map(name)).collect()
    }

    pub(crate) fn title(&self) -> String {
        format!("{} and {}", self.client, self.peer)
    }

    /// What an arrow without one says.
    pub(crate) fn rest(&self) -> Option<String> {
        (self.left_out > 0).then(|| format!("{} more segments", self.left_out))
    }

    fn text(&self, out: &mut String) {
        let longest = self.arrows.iter().map(|arrow| arrow.label.chars().count() + 6).max().unwrap_or(0);
        let space = longest.clamp(SPACE[0], SPACE[1]);
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{}", self.title());
        let _ = write!(out, "{:TIME$}", "");
        let headers = self.headers();
        for (index, header) in headers.iter().enumerate() {
            let width = if index + 1 == headers.len() { 0 } else { space + 1 };
            let _ = write!(out, "{header:<width$}");
        }
        out.push('\n');
        for arrow in &self.arrows {
            let line = arrow.text(self.ports.len(), space);
            let _ = writeln!(out, "{}", line.trim_end());
        }
        if let Some(rest) = self.rest() {
            let _ = writeln!(out, "{:TIME$}… {rest}", "");
        }
    }
}

impl Arrow {
    fn text(&self, columns: usize, space: usize) -> String {
        let mut out = format!("{:>10.6}  │", self.at.as_secs_f64());
        if self.skipped > 0 {
            let _ = write!(out, " … {} more", self.skipped);
            return out;
        }
        let mut label = self.label.clone();
        let room = self.column * (space + 1) - 1 - 6;
        if label.chars().count() > room {
            label = label.chars().take(room - 1).collect::<String>() + "…";
        }
        let (head, tail) = if self.up { ("── ", "▶") } else { ("◀─ ", "─") };
        let used = head.chars().count() + label.chars().count() + 1 + tail.chars().count();
        let width = self.column * (space + 1) - 1;
        let _ = write!(out, "{head}{label} {}{tail}│", "─".repeat(width.saturating_sub(used)));
        for _ in self.column..columns {
            let _ = write!(out, "{}│", " ".repeat(space));
        }
        if !self.note.is_empty() {
            let _ = write!(out, "  {}", self.note);
        }
        out
    }
}
