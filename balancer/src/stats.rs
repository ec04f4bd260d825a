//! Counters of every decision and every reason to drop: relaxed atomics, read as a snapshot.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use shunt_host::offload::Count;
use shunt_stack::redirect::TokenRefusal;
use shunt_stack::wire::{Packet, ParseError, TcpFlags};

use crate::Balancer;
use crate::connections::ConnectionsSnapshot;
use crate::limit::Limit;
use crate::route::{Decision, DropReason, Route, Way};
use crate::table::ServerId;

const WAYS: [(Way, &str); 18] = [
    (Way::Selected, "selected"),
    (Way::Owner, "owner"),
    (Way::LegacyHash, "legacy_hash"),
    (Way::LegacyServer, "legacy_server"),
    (Way::Datagram, "datagram"),
    (Way::Fragment, "fragment"),
    (Way::Balanced, "balanced"),
    (Way::Named, "named"),
    (Way::ErrorOwner, "error_owner"),
    (Way::ErrorHash, "error_hash"),
    (Way::ErrorLegacyServer, "error_legacy_server"),
    (Way::DefaultServer, "default_server"),
    (Way::ToClient, "to_client"),
    (Way::ErrorToClient, "error_to_client"),
    (Way::Answer, "answer"),
    (Way::Unchanged, "unchanged"),
    (Way::Redirect, "redirected"),
    (Way::TooBig, "too_big"),
];

const REASONS: [&str; 25] = [
    "unreadable",
    "unknown_port",
    "protocol",
    "later_fragment",
    "icmp",
    "icmp_quote",
    "no_server",
    "legacy",
    "family",
    "tiny_fragment",
    "fragment_range",
    "overlapping_fragment",
    "refused",
    "unanswerable",
    "answer_limit",
    "limited_packets",
    "limited_bytes",
    "limited_new",
    "no_connector",
    "token_missing",
    "token_unknown_key",
    "token_expired",
    "token_mismatch",
    "too_big",
    "tunnel",
];

fn reason_index(reason: DropReason) -> usize {
    match reason {
        DropReason::Parse(ParseError::TinyFragment(_)) => 9,
        DropReason::Parse(ParseError::FragmentRange(_)) => 10,
        DropReason::Parse(_) => 0,
        DropReason::UnknownPort(_) => 1,
        DropReason::Protocol(_) => 2,
        DropReason::LaterFragment(_) => 3,
        DropReason::Icmp { .. } => 4,
        DropReason::IcmpQuote { .. } => 5,
        DropReason::NoServer(_) | DropReason::NoPortlessServer(_) => 6,
        DropReason::Legacy(_) => 7,
        DropReason::Family(_) => 8,
        DropReason::OverlappingFragment(_) => 11,
        DropReason::Refused(_) => 12,
        DropReason::Unanswerable => 13,
        DropReason::AnswerLimit => 14,
        DropReason::Limited(Limit::Packets) => 15,
        DropReason::Limited(Limit::Bytes) => 16,
        DropReason::Limited(Limit::New) => 17,
        DropReason::NoConnector(_) => 18,
        DropReason::Token(TokenRefusal::Missing) => 19,
        DropReason::Token(TokenRefusal::UnknownKey(_)) => 20,
        DropReason::Token(TokenRefusal::Expired) => 21,
        DropReason::Token(TokenRefusal::Mismatch) => 22,
        DropReason::TooBig(_) => 23,
        DropReason::Tunnel(_) => 24,
    }
}

impl Route {
    /// The name under which packets that go this way are counted.
    pub fn name(self) -> &'static str {
        WAYS[self.way() as usize].1
    }
}

impl DropReason {
    /// The name under which packets that go nowhere for this reason are counted.
    pub fn name(self) -> &'static str {
        REASONS[reason_index(self)]
    }
}

/// A counter.
#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    fn add(&self, value: u64) {
        self.0.fetch_add(value, Ordering::Relaxed);
    }

    fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the whole balancer counts; outlives reloads.
#[derive(Debug, Default)]
pub struct Stats {
    ways: [Counter; WAYS.len()],
    drops: [Counter; REASONS.len()],
    /// By the reason for which they would have been dropped.
    defaulted: [Counter; REASONS.len()],
    malformed_options: Counter,
    confirmed: Counter,
    unconfirmed: Counter,
    /// Times that there began to be load, and that it ended (§10).
    loads: Counter,
    loads_over: Counter,
    /// As last seen.
    fragments: AtomicU64,
    fragments_evicted: Counter,
    path_mtu_changes: Counter,
    super_packets: Counter,
    device_errors: Counter,
    reloads: Counter,
    refused_reloads: Counter,
    /// Packets that the kernel has forwarded by itself; they are counted as decided, too.
    offloaded: Counter,
}

/// What is counted for one server; outlives reloads that keep its name.
#[derive(Debug, Default)]
pub(crate) struct ServerStats {
    selected: Counter,
    plain: Counter,
    packets: Counter,
    bytes: Counter,
    packets_back: Counter,
    bytes_back: Counter,
    checks: Counter,
    failed_checks: Counter,
    health_changes: Counter,
    unresolved: Counter,
}

/// All counters at one time.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Snapshot {
    /// Packets by what was decided about them.
    pub decisions: BTreeMap<&'static str, u64>,
    /// Packets dropped, by reason.
    pub drops: BTreeMap<&'static str, u64>,
    /// Packets that went to the default server, by the reason for which they would have been dropped.
    pub defaulted: BTreeMap<&'static str, u64>,
    /// Plain SYNs with a malformed redirect option (`W1`).
    pub malformed_options: u64,
    /// SYN-ACKs of servers that got C here (`B1`).
    pub confirmed_syn_acks: u64,
    /// SYN-ACKs of servers without room for it (`W2`).
    pub unconfirmed_syn_acks: u64,
    /// Times that tokens began to be demanded because of load (§10).
    pub token_loads: u64,
    /// Whether there was such load when the last SYN came to a service port.
    pub token_load: bool,
    /// Fragmented datagrams remembered (§9), when one was last added.
    pub fragments: u64,
    /// Fragmented datagrams forgotten before their time because there were too many.
    pub fragments_evicted: u64,
    /// How often a router said that less fits on the way to a server than was known (`gue` mode).
    pub path_mtu_changes: u64,
    /// Packets that came, and went, as one for several segments. Servers' packets and bytes are those of the segments.
    pub super_packets: u64,
    /// Those that were cut here because the kernel did not take them; filled in by the daemon.
    pub segmented: u64,
    /// Packets that a device did not take.
    pub device_errors: u64,
    /// Configurations taken over.
    pub reloads: u64,
    /// Configurations refused.
    pub refused_reloads: u64,
    /// Packets that the kernel forwarded by itself, a super-packet as one; they are in `decisions` and in the servers'
    /// counters, too. Read every second.
    pub offloaded: u64,
    /// By server.
    pub servers: BTreeMap<String, ServerSnapshot>,
    /// Connections as their SYN, FIN and RST segments tell, where that is switched on; filled in by the daemon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<ConnectionsSnapshot>,
}

/// One server's counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct ServerSnapshot {
    /// SYNs with R that it was chosen for (`B1`), whoever answered them; a repeated SYN counts again.
    pub selected: u64,
    /// SYNs of plain clients (`B3`).
    pub plain: u64,
    /// Packets sent to it.
    pub packets: u64,
    /// Bytes sent to it, IP headers included.
    pub bytes: u64,
    /// Packets from it that passed here (`network` mode).
    pub packets_back: u64,
    /// Their bytes.
    pub bytes_back: u64,
    /// Its load from 0.0 to 1.0 as last told, if it ever was ([`Balancer::set_load`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<f32>,
    /// Seconds since then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_age_s: Option<f64>,
    /// Looks at its service ports (`B7`).
    pub checks: u64,
    /// Those that failed.
    pub failed_checks: u64,
    /// How often one of its ports has become healthy or unhealthy.
    pub health_changes: u64,
    /// How often nobody on its link answered for its next hop; each time the kernel drops what waited for the answer.
    pub unresolved: u64,
}

impl Stats {
    pub(crate) fn device_error(&self) {
        self.device_errors.add(1);
    }

    /// Notes that there is load, or no longer (§10).
    pub(crate) fn load(&self, begins: bool) {
        if begins { self.loads.add(1) } else { self.loads_over.add(1) }
    }

    /// Counts a SYN-ACK that was to get C.
    pub(crate) fn confirmed(&self, done: bool) {
        if done { self.confirmed.add(1) } else { self.unconfirmed.add(1) }
    }

    pub(crate) fn path_mtu_changed(&self) {
        self.path_mtu_changes.add(1);
    }

    pub(crate) fn fragments(&self, remembered: usize, evicted: u64) {
        self.fragments.store(remembered as u64, Ordering::Relaxed);
        self.fragments_evicted.add(evicted);
    }

    pub(crate) fn reload(&self, taken: bool) {
        if taken { self.reloads.add(1) } else { self.refused_reloads.add(1) }
    }

    /// Counts what the kernel has forwarded by itself.
    pub(crate) fn offloaded(&self, way: Way, packets: u64) {
        self.offloaded.add(packets);
        self.ways[way as usize].add(packets);
    }

    pub(crate) fn dropped(&self, reason: DropReason) {
        self.drops[reason_index(reason)].add(1);
    }
}

impl ServerStats {
    /// Counts packets sent to the server.
    pub(crate) fn sent(&self, packets: u64, bytes: u64) {
        self.packets.add(packets);
        self.bytes.add(bytes);
    }

    /// Counts packets that the kernel has forwarded by itself, to the server or from it.
    pub(crate) fn offloaded(&self, back: bool, count: Count) {
        let (packets, bytes) =
            if back { (&self.packets_back, &self.bytes_back) } else { (&self.packets, &self.bytes) };
        packets.add(count.packets);
        bytes.add(count.bytes);
    }

    /// Packets sent to it so far.
    pub(crate) fn packets_sent(&self) -> u64 {
        self.packets.value()
    }

    /// Counts a look at its health.
    pub(crate) fn checked(&self, good: bool) {
        self.checks.add(1);
        self.failed_checks.add(u64::from(!good));
    }

    /// Counts a change of its health.
    pub(crate) fn health_changed(&self) {
        self.health_changes.add(1);
    }

    /// Counts that nobody answered for its next hop.
    pub(crate) fn unresolved(&self) {
        self.unresolved.add(1);
    }

    pub(crate) fn snapshot(&self) -> ServerSnapshot {
        ServerSnapshot {
            selected: self.selected.value(),
            plain: self.plain.value(),
            packets: self.packets.value(),
            bytes: self.bytes.value(),
            packets_back: self.packets_back.value(),
            bytes_back: self.bytes_back.value(),
            load: None,
            load_age_s: None,
            checks: self.checks.value(),
            failed_checks: self.failed_checks.value(),
            health_changes: self.health_changes.value(),
            unresolved: self.unresolved.value(),
        }
    }
}

impl Balancer {
    /// Counts a packet and its route.
    pub(crate) fn count(&self, route: Route, packet: &Packet) {
        self.stats.ways[route.way() as usize].add(1);
        let (packets, bytes) = (packet.segment_count() as u64, packet.segmented_len() as u64);
        if packet.offload().gso.is_some() {
            self.stats.super_packets.add(1);
        }
        match route {
            Route::ToServer { server, decision } => {
                if let Decision::Default(reason) = decision {
                    self.stats.defaulted[reason_index(reason)].add(1);
                }
                let stats = &self.servers[server.index()];
                stats.sent(packets, bytes);
                match decision {
                    Decision::Selected => stats.selected.add(1),
                    Decision::LegacyHash | Decision::LegacyServer => self.count_plain(stats, packet),
                    _ => {}
                }
            }
            Route::ToClient { server, .. } => {
                let stats = &self.servers[server.index()];
                stats.packets_back.add(packets);
                stats.bytes_back.add(bytes);
            }
            Route::Redirect { server, .. } => self.servers[server.index()].selected.add(1),
            Route::ErrorToClient { .. } | Route::Answer | Route::TooBig { .. } | Route::Unchanged => {}
        }
    }

    fn count_plain(&self, stats: &ServerStats, packet: &Packet) {
        let Some(tcp) = packet.tcp() else { return };
        if tcp.flags().contains(TcpFlags::SYN) {
            stats.plain.add(1);
            if tcp.redirect(self.table.exid).is_err() {
                self.stats.malformed_options.add(1);
            }
        }
    }

    /// A server's name.
    pub fn server_name(&self, server: ServerId) -> Option<&str> {
        self.table.targets.get(server.index()).map(|target| target.name.as_str())
    }

    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        let stats = &self.stats;
        let named = |counters: &[Counter]| -> BTreeMap<&'static str, u64> {
            REASONS.into_iter().zip(counters.iter().map(Counter::value)).collect()
        };
        Snapshot {
            decisions: WAYS.iter().map(|(way, name)| (*name, stats.ways[*way as usize].value())).collect(),
            drops: named(&stats.drops),
            defaulted: named(&stats.defaulted),
            malformed_options: stats.malformed_options.value(),
            confirmed_syn_acks: stats.confirmed.value(),
            unconfirmed_syn_acks: stats.unconfirmed.value(),
            token_loads: stats.loads.value(),
            token_load: self.tokens.may_demand() && stats.loads.value() > stats.loads_over.value(),
            fragments: stats.fragments.load(Ordering::Relaxed),
            fragments_evicted: stats.fragments_evicted.value(),
            path_mtu_changes: stats.path_mtu_changes.value(),
            super_packets: stats.super_packets.value(),
            segmented: 0,
            device_errors: stats.device_errors.value(),
            reloads: stats.reloads.value(),
            refused_reloads: stats.refused_reloads.value(),
            offloaded: stats.offloaded.value(),
            servers: self
                .table
                .names()
                .map(str::to_owned)
                .zip(self.servers.iter().map(|stats| stats.snapshot()))
                .map(|(name, snapshot)| self.with_load(name, snapshot))
                .collect(),
            connections: None,
        }
    }

    fn with_load(&self, name: String, mut snapshot: ServerSnapshot) -> (String, ServerSnapshot) {
        if let Some((load, told)) = self.lives.get(&name).and_then(|live| live.load()) {
            snapshot.load = Some(load);
            snapshot.load_age_s = Some(self.lives.now().since(told).as_secs_f64());
        }
        (name, snapshot)
    }

    /// The counters of each server, by name.
    pub(crate) fn server_stats(&self) -> impl Iterator<Item = (&str, &Arc<ServerStats>)> {
        self.table.names().zip(self.servers.iter())
    }
}

/// Reads one counter of a server.
type Column = fn(&ServerSnapshot) -> u64;

/// In the text format of Prometheus.
impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (family, label, values) in [
            ("shunt_balancer_packets_total", "decision", &self.decisions),
            ("shunt_balancer_dropped_packets_total", "reason", &self.drops),
            ("shunt_balancer_defaulted_packets_total", "reason", &self.defaulted),
        ] {
            writeln!(f, "# TYPE {family} counter")?;
            for (name, value) in values {
                writeln!(f, "{family}{{{label}=\"{name}\"}} {value}")?;
            }
        }
        for (name, value) in [
            ("malformed_options", self.malformed_options),
            ("confirmed_syn_acks", self.confirmed_syn_acks),
            ("unconfirmed_syn_acks", self.unconfirmed_syn_acks),
            ("token_loads", self.token_loads),
            ("fragments_evicted", self.fragments_evicted),
            ("path_mtu_changes", self.path_mtu_changes),
            ("super_packets", self.super_packets),
            ("segmented", self.segmented),
            ("device_errors", self.device_errors),
            ("reloads", self.reloads),
            ("refused_reloads", self.refused_reloads),
            ("offloaded_packets", self.offloaded),
        ] {
            writeln!(f, "# TYPE shunt_balancer_{name}_total counter\nshunt_balancer_{name}_total {value}")?;
        }
        let load = u8::from(self.token_load);
        writeln!(f, "# TYPE shunt_balancer_token_load gauge\nshunt_balancer_token_load {load}")?;
        writeln!(f, "# TYPE shunt_balancer_fragments gauge\nshunt_balancer_fragments {}", self.fragments)?;
        let columns: [(&str, Column); 10] = [
            ("selected", |server| server.selected),
            ("plain", |server| server.plain),
            ("packets", |server| server.packets),
            ("bytes", |server| server.bytes),
            ("back_packets", |server| server.packets_back),
            ("back_bytes", |server| server.bytes_back),
            ("checks", |server| server.checks),
            ("failed_checks", |server| server.failed_checks),
            ("health_changes", |server| server.health_changes),
            ("unresolved", |server| server.unresolved),
        ];
        for (column, value) in columns {
            writeln!(f, "# TYPE shunt_balancer_server_{column}_total counter")?;
            for (name, server) in &self.servers {
                writeln!(f, "shunt_balancer_server_{column}_total{{server=\"{name}\"}} {}", value(server))?;
            }
        }
        if self.servers.values().any(|server| server.load.is_some()) {
            writeln!(f, "# TYPE shunt_balancer_server_load gauge")?;
            for (name, load) in self.servers.iter().filter_map(|(name, server)| Some((name, server.load?))) {
                writeln!(f, "shunt_balancer_server_load{{server=\"{name}\"}} {load}")?;
            }
        }
        self.connections.iter().try_for_each(|connections| connections.fmt(f))
    }
}
