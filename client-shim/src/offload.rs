//! What the kernel does by itself: the exchange of X and Y in settled connections (`C11`).
//!
//! The machine says which connections are settled ([`shunt_stack::redirect::SwapChange`]), the kernel's maps
//! ([`shunt_host::swaps`]) take their segments past the device, from the first after the handshake to the last. SYNs,
//! segments with the option and ICMP errors still come to the machine. What is added waits for a few packets more, none of
//! which waits for it; what the machine takes back is gone before the packet leaves that made it do so, or the same ports
//! could be another connection's.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;

use serde::Serialize;
use shunt_host::offload::Count;
use shunt_host::swaps::{MAX_SWAPS, PortSwap, PortSwaps, SwapCounts};
use shunt_stack::redirect::{Client, Swap, SwapChange};

use crate::config::{Config, Hold, Mode};

/// Segments of a connection that has come back, both ways together, before the kernel gets it again; the machine doubles
/// it each time. Two entries of a map cost as much as one or two packets do here.
const RESETTLE_AFTER: u32 = 32;

/// Why the kernel does nothing by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// `[host] offload = "off"`.
    Off,
    /// A proxy's TCP is not the kernel's.
    Proxy,
    /// All packets are recorded.
    Capture,
    /// `notrack = false`.
    Tracked,
    /// `hold = "never"`.
    Unheld,
    /// The kernel refuses.
    Kernel(String),
}

impl Obstacle {
    /// `recorded`: whether a capture has to see every packet; `nft`: whether the kernel has nftables.
    pub(crate) fn of(config: &Config, recorded: bool, nft: bool) -> Option<Obstacle> {
        let all = [
            (!config.host.offload, Obstacle::Off),
            (config.mode == Mode::Proxy, Obstacle::Proxy),
            (recorded, Obstacle::Capture),
            (!config.notrack, Obstacle::Tracked),
            (config.hold == Hold::Never, Obstacle::Unheld),
            (!nft, Obstacle::Kernel("it has no nftables".to_owned())),
        ];
        all.into_iter().find_map(|(stands, obstacle)| stands.then_some(obstacle))
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::Off => f.write_str("switched off by `[host] offload = \"off\"`"),
            Obstacle::Proxy => f.write_str("a proxy has a TCP of its own"),
            Obstacle::Capture => f.write_str("a capture records every packet"),
            Obstacle::Tracked => {
                f.write_str("`notrack = false`: connection tracking would see two different connections")
            }
            Obstacle::Unheld => f.write_str(
                "`hold = \"never\"`: after a kill new connections could have the ports of those left to it",
            ),
            Obstacle::Kernel(why) => write!(f, "the kernel refuses: {why}"),
        }
    }
}

/// What has been left to the kernel since the shim was started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct KernelCounters {
    /// Connections left to it now.
    pub(crate) connections: usize,
    /// Connections that have been.
    pub(crate) added: u64,
    /// Those that have come back or ended.
    pub(crate) removed: u64,
    /// Those that stay in userspace because there are as many as there may be.
    pub(crate) refused: u64,
    /// Packets of the local TCP that it has passed on, a super-packet being one.
    pub(crate) packets_out: u64,
    /// Their bytes, headers included.
    pub(crate) bytes_out: u64,
    /// Packets of the network.
    pub(crate) packets_back: u64,
    /// Their bytes.
    pub(crate) bytes_back: u64,
}

/// What is left to the kernel, and what is about to be.
pub(crate) struct Kernel {
    swaps: Option<PortSwaps>,
    obstacle: Option<Obstacle>,
    /// By local socket and VIP: the port for the network.
    waiting: HashMap<(SocketAddr, SocketAddr), u16>,
    failure: Option<String>,
    /// The kernel's counters as last read.
    seen: SwapCounts,
    counters: KernelCounters,
}

impl Kernel {
    pub(crate) fn new(swaps: Option<PortSwaps>, obstacle: Option<Obstacle>) -> Self {
        Self {
            swaps,
            obstacle,
            waiting: HashMap::new(),
            failure: None,
            seen: SwapCounts::default(),
            counters: KernelCounters::default(),
        }
    }

    /// [`ClientConfig::resettle_after`](shunt_stack::redirect::ClientConfig::resettle_after).
    pub(crate) fn resettle_after(&self) -> Option<u32> {
        self.swaps.as_ref().map(|_| RESETTLE_AFTER)
    }

    /// Why nothing is left to the kernel; `None` if anything may be.
    pub(crate) fn obstacle(&self) -> Option<&Obstacle> {
        self.obstacle.as_ref()
    }

    /// Makes the kernel's maps just what the machine, which has begun anew, calls settled.
    pub(crate) async fn take_over(&mut self, client: &mut Client) {
        self.waiting.clear();
        let gone: Vec<PortSwap> = self.collect(client);
        let Some(swaps) = &self.swaps else { return };
        let stays = |swap: &PortSwap| self.waiting.get(&(swap.local, swap.remote)) == Some(&swap.port);
        let unknown = swaps.iter().filter(|swap| !stays(swap));
        let gone = gone.into_iter().chain(unknown).collect();
        self.change(gone).await;
    }

    /// Hears what the machine says. What it takes back is gone when this returns. What it adds waits for
    /// [`flush`](Self::flush), and for more of it: a transaction costs several times as much as what it adds.
    pub(crate) async fn follow(&mut self, client: &mut Client) {
        let gone = self.collect(client);
        if !gone.is_empty() {
            self.change(gone).await;
        }
    }

    /// Adds what waits.
    pub(crate) async fn flush(&mut self) {
        if !self.waiting.is_empty() {
            self.change(Vec::new()).await;
        }
    }

    /// Why the kernel cannot be used any more, told once: its table must go.
    pub(crate) fn take_failure(&mut self) -> Option<String> {
        self.failure.take()
    }

    /// Hears the machine; what it takes back that may be in the maps.
    fn collect(&mut self, client: &mut Client) -> Vec<PortSwap> {
        let (mut gone, mut refused) = (Vec::new(), Vec::new());
        while let Some(change) = client.poll_swap() {
            let Some(swaps) = &self.swaps else { continue };
            match change {
                SwapChange::Settled(swap) => {
                    let Swap { local, vip, service_port } = swap;
                    let stands = swaps.contains(&PortSwap { local, remote: vip, port: service_port });
                    if stands || swaps.len() + self.waiting.len() < MAX_SWAPS {
                        self.waiting.insert((local, vip), service_port);
                    } else {
                        refused.push(swap);
                    }
                }
                SwapChange::Unsettled(Swap { local, vip, service_port }) => {
                    if self.waiting.remove(&(local, vip)).is_none() {
                        gone.push(PortSwap { local, remote: vip, port: service_port });
                    }
                }
            }
        }
        self.counters.refused += refused.len() as u64;
        // Not before all is heard: a later connection with the same ports may have got a place.
        for swap in refused.iter().filter(|swap| !self.waiting.contains_key(&(swap.local, swap.vip))) {
            client.refuse_swap(swap);
        }
        gone
    }

    async fn change(&mut self, gone: Vec<PortSwap>) {
        let Some(swaps) = &mut self.swaps else { return };
        let of = |((local, remote), port)| PortSwap { local, remote, port };
        let new: Vec<PortSwap> = self.waiting.drain().map(of).collect();
        self.counters.removed += gone.iter().filter(|swap| swaps.contains(swap)).count() as u64;
        self.counters.added += new.iter().filter(|swap| !swaps.contains(swap)).count() as u64;
        if let Err(error) = swaps.change(&gone, &new).await {
            // Before a packet leaves that what stands would lead astray; the rest of it goes after.
            if let Err(error) = swaps.remove().await {
                tracing::warn!(%error, "the kernel keeps its swaps for now");
            }
            self.swaps = None;
            self.obstacle = Some(Obstacle::Kernel(error.to_string()));
            self.failure = Some(error.to_string());
        }
    }

    /// What was counted, the kernel's counters as they are now.
    pub(crate) async fn counters(&mut self) -> &KernelCounters {
        self.counters.connections = self.swaps.as_ref().map_or(0, PortSwaps::len);
        if let Some(swaps) = &self.swaps {
            match swaps.counts().await {
                Ok(counts) => {
                    let seen = std::mem::replace(&mut self.seen, counts);
                    let (out, back) = (since(seen.out, counts.out), since(seen.back, counts.back));
                    let counters = &mut self.counters;
                    counters.packets_out += out.packets;
                    counters.bytes_out += out.bytes;
                    counters.packets_back += back.packets;
                    counters.bytes_back += back.bytes;
                }
                Err(error) => tracing::debug!(%error, "the kernel's counters cannot be read"),
            }
        }
        &self.counters
    }
}

/// What has been counted since; all of it where the table has been made anew meanwhile.
fn since(seen: Count, now: Count) -> Count {
    if now.packets < seen.packets {
        return now;
    }
    Count { packets: now.packets - seen.packets, bytes: now.bytes.saturating_sub(seen.bytes) }
}

#[cfg(test)]
mod tests {
    use shunt_host::Source;

    use super::*;

    #[test]
    fn every_obstacle_is_told_in_words() {
        let obstacle = |extra: &str, recorded, nft| {
            let proxy = if extra.contains("proxy") { "[proxy]\nsocks5 = \"127.0.0.1:1080\"\n" } else { "" };
            let (keys, host) = extra.split_once("[host]").unwrap_or((extra, ""));
            let text = format!(
                "role = \"client\"\n{keys}\n[[vip]]\naddress = \"203.0.113.10\"\n{proxy}[host]\n{host}\n"
            );
            let config = Config::from_source(&Source::new("client.toml", text)).unwrap();
            Obstacle::of(&config, recorded, nft).map(|obstacle| obstacle.to_string())
        };
        assert_eq!(obstacle("", false, true), None);
        assert_eq!(obstacle("[host]offload = \"auto\"", false, true), None);
        for (extra, recorded, nft, words) in [
            ("[host]offload = \"off\"", false, true, "switched off"),
            ("mode = \"proxy\"", false, true, "a TCP of its own"),
            ("", true, true, "a capture"),
            ("notrack = false", false, true, "connection tracking"),
            ("hold = \"never\"", false, true, "after a kill"),
            ("", false, false, "no nftables"),
        ] {
            let told = obstacle(extra, recorded, nft).unwrap();
            assert!(told.contains(words), "{told}");
        }
    }
}
