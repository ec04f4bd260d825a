//! The demo's hosts and the links between them.

use shunt_lab::{Host, Lab, LinkOptions, Result, Via};

use super::plan::{Family, Net, SERVERS, server_name};

/// The hosts: two clients and a balancer around a router, servers behind the balancer.
pub(crate) struct Network {
    pub(crate) client: Host,
    pub(crate) plain_client: Host,
    pub(crate) balancer: Host,
    pub(crate) servers: Vec<Host>,
}

impl Network {
    /// Makes them all in `lab`.
    ///
    /// # Errors
    /// The kernel refuses something.
    pub(crate) fn build(lab: &Lab, family: Family) -> Result<Self> {
        let router = lab.host("router")?;
        let balancer = lab.host("balancer")?;
        let client = lab.host("client")?;
        let plain_client = lab.host("plain-client")?;
        for (host, net, device) in [(&client, Net::Client, "eth1"), (&plain_client, Net::PlainClient, "eth2")]
        {
            connect(lab, family, net, (&router, device), (host, "eth0"))?;
            host.route(family.default_route(), gateway(family, net))?;
        }
        connect(lab, family, Net::Middle, (&balancer, "eth0"), (&router, "eth0"))?;
        balancer.route(family.default_route(), Via::gateway(family.address(Net::Middle, 2).to_string()))?;
        router.route(&family.vip_prefix(), gateway(family, Net::Middle))?;
        let mut servers = Vec::with_capacity(SERVERS);
        for server in 0..SERVERS {
            let host = lab.host(&server_name(server))?;
            let device = format!("eth{}", server + 1);
            connect(lab, family, Net::Server(server), (&balancer, &device), (&host, "eth0"))?;
            host.route(family.default_route(), gateway(family, Net::Server(server)))?;
            servers.push(host);
        }
        for host in [&router, &balancer] {
            match family {
                Family::V4 => host.sysctl("net.ipv4.ip_forward", "1")?,
                Family::V6 => host.sysctl("net.ipv6.conf.all.forwarding", "1")?,
            }
        }
        Ok(Self { client, plain_client, balancer, servers })
    }
}

/// Links two hosts; the first gets the address 1 of the network, the second 2.
fn connect(lab: &Lab, family: Family, net: Net, first: (&Host, &str), second: (&Host, &str)) -> Result<()> {
    lab.link(first.0, first.1, second.0, second.1, LinkOptions::default())?;
    first.0.address(first.1, &family.interface(net, 1))?;
    second.0.address(second.1, &family.interface(net, 2))
}

fn gateway(family: Family, net: Net) -> Via {
    Via::gateway(family.address(net, 1).to_string())
}
