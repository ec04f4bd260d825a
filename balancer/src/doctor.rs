//! What a balancer needs of its host, for [`shunt_host::doctor`].

use std::collections::BTreeSet;
use std::net::IpAddr;

use shunt_host::doctor::Needs;
use shunt_host::nft_available;
use shunt_host::offload::End;

use crate::config::Config;
use crate::host::{Devices, LARGEST_MTU, ServerDevice, changes, device_name};
use crate::offload::Offloadable;

/// What running this configuration asks of the host. The kernel is asked whether it has nftables; nothing is changed.
pub async fn needs(config: &Config) -> Needs {
    let main = config.host.device.clone();
    let own_devices = config.servers.iter().filter(|_| config.forward.uses_devices());
    let servers = (0..).zip(own_devices);
    let servers = servers
        .map(|(slot, _)| ServerDevice { name: device_name(&main, slot), slot, connected: true })
        .collect();
    let devices = Devices { main, mtu: LARGEST_MTU, servers };
    let interfaces: BTreeSet<String> =
        config.servers.iter().filter_map(|server| server.device.clone()).collect();
    let reach = if config.forward.uses_devices() {
        Vec::new()
    } else {
        config.servers.iter().flat_map(|server| server.addresses.iter().copied()).collect()
    };
    let nft = nft_available().await;
    Needs {
        options: config.host.clone(),
        changes: changes(config, &devices, nft),
        interfaces: interfaces.into_iter().collect(),
        reach,
        own: Vec::new(),
        listening: Vec::new(),
        ports: config.admin_ports.clone(),
        offload: offload(config, nft),
        forwards: if nft { forwards(config) } else { BTreeSet::new() },
    }
}

/// Whether all that can be left to the kernel is; `None` if it is switched off.
fn offload(config: &Config, nft: bool) -> Option<Result<(), String>> {
    if !config.host.offload {
        return None;
    }
    if !nft {
        return Some(Err("it has no nftables".to_owned()));
    }
    Some(match Offloadable::new(config) {
        Err(obstacle) => Err(obstacle.to_string()),
        Ok(offloadable) => {
            let names = config.services.iter().map(|service| service.name.as_str());
            let services = names.zip(offloadable.services).filter_map(|(name, why)| Some((name, why?)));
            let plain = offloadable.plain.map(|why| ("plain clients", why));
            let not: Vec<String> =
                services.chain(plain).map(|(what, why)| format!("{what}: {why}")).collect();
            if not.is_empty() { Ok(()) } else { Err(not.join(", ")) }
        }
    })
}

/// What passes the host's firewall without a device of ours.
fn forwards(config: &Config) -> BTreeSet<(End, IpAddr)> {
    if Offloadable::new(config).is_err() {
        return BTreeSet::new();
    }
    if config.forward.uses_devices() {
        return config.vips.iter().map(|vip| (End::Destination, *vip)).collect();
    }
    let servers = config.servers.iter().flat_map(|server| &server.addresses);
    let there = servers.map(|address| (End::Destination, *address));
    there.chain(config.vips.iter().map(|vip| (End::Source, *vip))).collect()
}
