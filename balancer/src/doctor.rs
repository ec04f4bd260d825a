//! What a balancer needs of its host, for [`shunt_host::doctor`].

use std::collections::BTreeSet;

use shunt_host::doctor::Needs;
use shunt_host::nft_available;

use crate::config::Config;
use crate::host::{Devices, LARGEST_MTU, ServerDevice, changes, device_name};

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
    Needs {
        options: config.host.clone(),
        changes: changes(config, &devices, nft_available().await),
        interfaces: interfaces.into_iter().collect(),
        reach,
        own: Vec::new(),
        listening: Vec::new(),
        ports: config.admin_ports.clone(),
    }
}
