//! Who is compared.

use clap::ValueEnum;

/// One way for packets between the client and the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Contestant {
    /// Client and server on one link, nothing between them: what the others are compared with
    Direct,
    /// A router: the kernel's forwarding alone, the limit
    Kernel,
    /// nftables: destination NAT with connection tracking
    Nft,
    /// haproxy, mode tcp: a connection on each side
    Haproxy,
    /// nginx, module stream: the same
    Nginx,
    /// The balancer as it comes; the client connects to the service port
    Shunt,
    /// The balancer without the kernel offload: every packet passes its TUN device
    ShuntTun,
    /// The same with two queues, each with a thread of its own
    ShuntTunQueues,
    /// The same with one queue and without super-packets: one packet a read
    ShuntTunPlain,
    /// The balancer and a client without a shim: placed by hash
    Plain,
    /// Client shim, balancer and agent, every connection redirected by a second SYN
    Reconnect,
    /// Client shim, balancer and agent, every connection handed over in its handshake
    Handover,
}

/// Where the client connects to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// The server's own address.
    Server,
    /// The shared address and a service's redirect port.
    RedirectPort,
    /// The shared address and the server's service port, as the packets of a redirected connection go.
    ServicePort,
}

impl Contestant {
    /// All, in the order in which they are shown.
    pub fn all() -> &'static [Contestant] {
        Self::value_variants()
    }

    /// Those of which one line of JSON tells.
    pub const QUICK: [Contestant; 6] = [
        Contestant::Kernel,
        Contestant::Nft,
        Contestant::Haproxy,
        Contestant::Nginx,
        Contestant::Shunt,
        Contestant::ShuntTun,
    ];

    /// As in options, tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Contestant::Direct => "direct",
            Contestant::Kernel => "kernel",
            Contestant::Nft => "nft",
            Contestant::Haproxy => "haproxy",
            Contestant::Nginx => "nginx",
            Contestant::Shunt => "shunt",
            Contestant::ShuntTun => "shunt_tun",
            Contestant::ShuntTunQueues => "shunt_tun_queues",
            Contestant::ShuntTunPlain => "shunt_tun_plain",
            Contestant::Plain => "plain",
            Contestant::Reconnect => "reconnect",
            Contestant::Handover => "handover",
        }
    }

    /// What it is, in a line.
    pub fn about(self) -> String {
        let value = self.to_possible_value();
        value.and_then(|value| value.get_help().map(ToString::to_string)).unwrap_or_default()
    }

    /// Where the client connects to.
    pub fn entry(self) -> Entry {
        match self {
            Contestant::Direct | Contestant::Kernel => Entry::Server,
            Contestant::Shunt
            | Contestant::ShuntTun
            | Contestant::ShuntTunQueues
            | Contestant::ShuntTunPlain => Entry::ServicePort,
            _ => Entry::RedirectPort,
        }
    }

    /// Whether the balancer under test is in the middle.
    pub fn is_shunt(self) -> bool {
        self >= Contestant::Shunt
    }

    /// Whether what is in the middle is a process.
    pub fn is_process(self) -> bool {
        self >= Contestant::Haproxy
    }

    /// Whether an agent runs beside the server.
    pub fn has_agent(self) -> bool {
        self >= Contestant::Plain
    }

    /// How the shim beside the client goes on, if there is one.
    pub fn continuation(self) -> Option<&'static str> {
        match self {
            Contestant::Reconnect => Some("reconnect"),
            Contestant::Handover => Some("handover"),
            _ => None,
        }
    }

    /// What it can at best be as good as: the kernel's forwarding, or with programs at the ends nothing in the middle.
    pub fn limit(self) -> Option<Contestant> {
        match self {
            Contestant::Direct | Contestant::Kernel => None,
            one if one.has_agent() => Some(Contestant::Direct),
            _ => Some(Contestant::Kernel),
        }
    }

    /// Lines of the balancer's table `[host]`.
    pub fn host_keys(self) -> &'static [&'static str] {
        match self {
            Contestant::ShuntTun => &["offload = \"off\""],
            Contestant::ShuntTunQueues => &["offload = \"off\"", "queues = 2"],
            Contestant::ShuntTunPlain => &["offload = \"off\"", "super_packets = false"],
            _ => &[],
        }
    }

    /// The key without which it would be the same as another.
    pub fn needs_key(self) -> Option<&'static str> {
        match self {
            Contestant::ShuntTunPlain => Some("super_packets = false"),
            Contestant::ShuntTunQueues => Some("queues = 2"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_option() {
        for contestant in Contestant::all() {
            assert_eq!(Contestant::from_str(contestant.name(), false), Ok(*contestant));
            assert!(!contestant.about().is_empty(), "{contestant:?}");
        }
    }

    #[test]
    fn only_the_balancers_packets_are_those_of_a_redirected_connection() {
        let direct: Vec<&str> = Contestant::all()
            .iter()
            .filter(|contestant| contestant.entry() == Entry::ServicePort)
            .map(|contestant| contestant.name())
            .collect();
        assert_eq!(direct, ["shunt", "shunt_tun", "shunt_tun_queues", "shunt_tun_plain"]);
        assert!(Contestant::all().iter().filter(|one| one.has_agent()).all(|one| one.is_shunt()));
    }
}
