//! What a client needs of its host, for [`shunt_host::doctor`].

use std::collections::BTreeSet;

use shunt_host::doctor::Needs;

use crate::config::Config;
use crate::error::Error;
use crate::offload::Obstacle;
use crate::paths::Paths;
use crate::setup::{self, Facts};

/// What running this configuration asks of the host. The kernel is asked, nothing is changed.
///
/// # Errors
/// The kernel does not answer, or a shared address goes by another interface than the configured one.
pub async fn needs(config: &Config) -> Result<Needs, Error> {
    let paths = match Paths::look_up(config.vips(), config.interface.as_deref()).await {
        Ok(paths) => paths,
        // Told among the findings.
        Err(Error::OwnVip(_)) => Paths::default(),
        Err(error) => return Err(error),
    };
    let mut facts = Facts::gather(&paths).await;
    let obstacle = Obstacle::of(config, false, facts.nft);
    facts.offload = obstacle.is_none();
    let offload = match obstacle {
        None => Some(Ok(())),
        // That was asked for.
        Some(Obstacle::Off | Obstacle::Proxy) => None,
        Some(why) => Some(Err(why.to_string())),
    };
    Ok(Needs {
        options: config.host.clone(),
        changes: setup::changes(config, &paths, &facts),
        interfaces: config.interface.iter().cloned().collect(),
        reach: config.vips().collect(),
        own: Vec::new(),
        listening: Vec::new(),
        ports: Vec::new(),
        offload,
        forwards: BTreeSet::new(),
    })
}
