//! `vips`: by which addresses clients know a server whose own address a balancer puts in their place.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use shunt_host::{ConfigError, Family, Source};
use toml::Spanned;

/// The VIP of each of `addresses` at a service, where it is another: the one of its family.
pub(super) fn resolve(
    source: &Source,
    vips: Option<&Spanned<Vec<IpAddr>>>,
    addresses: &[IpAddr],
    service_port: u16,
    shared: &mut BTreeMap<SocketAddr, IpAddr>,
) -> Result<(), ConfigError> {
    let Some(vips) = vips else { return Ok(()) };
    let list = vips.get_ref();
    for family in Family::BOTH {
        let of_family = || list.iter().filter(|vip| Family::of(**vip) == family);
        // An address that is a VIP itself stands for itself.
        let others = of_family().filter(|vip| !addresses.contains(vip)).count();
        if others > 1 {
            let message = format!(
                "which of the {family} VIPs an address stands for is not clear: give services `vips` of their own"
            );
            return Err(source.error_at(vips.span(), message));
        }
        let own = addresses.iter().filter(|own| Family::of(**own) == family && !list.contains(own));
        for own in own {
            if let Some(vip) = of_family().find(|vip| !addresses.contains(vip)) {
                shared.insert(SocketAddr::new(*own, service_port), *vip);
            }
        }
    }
    Ok(())
}
