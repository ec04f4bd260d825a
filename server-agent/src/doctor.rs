//! What an agent needs of its host, for [`shunt_host::doctor`].

use std::collections::BTreeSet;

use shunt_host::HostError;
use shunt_host::doctor::Needs;

use crate::config::Config;
use crate::setup::{self, Facts};

/// What running this configuration asks of the host. The kernel is asked, nothing is changed.
///
/// # Errors
/// The kernel does not answer.
pub async fn needs(config: &Config) -> Result<Needs, HostError> {
    let facts = match Facts::gather(config).await {
        Ok(facts) => facts,
        // Told among the findings.
        Err(HostError::NoInterface(_)) => Facts { nft: true, mtu: 1500, ..Facts::default() },
        Err(error) => return Err(error),
    };
    let (mut listening, mut ports): (Vec<_>, Vec<_>) =
        config.service_sockets().map(|(address, _)| (address, address.port())).unzip();
    listening.sort_unstable();
    ports.extend(config.services.iter().map(|service| service.redirect_port));
    ports.sort_unstable();
    ports.dedup();
    Ok(Needs {
        options: config.host.clone(),
        changes: setup::changes(config, &facts, &[]),
        interfaces: vec![config.interface.clone()],
        reach: Vec::new(),
        own: config.addresses.clone(),
        listening,
        ports,
        offload: None,
        forwards: BTreeSet::new(),
    })
}
