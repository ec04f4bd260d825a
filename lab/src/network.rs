//! Addresses, routes, bridges, device features and counters of a host, by netlink.

use std::net::IpAddr;

use nlink::netlink::addr::{Ipv4Address, Ipv6Address};
use nlink::netlink::genl::ethtool::FeaturesBuilder;
use nlink::netlink::link::BridgeLink;
use nlink::netlink::route::{Ipv4Route, Ipv6Route, NextHop};
use nlink::netlink::types::route::RouteScope;
use nlink::{Connection, netlink::Ethtool};

use crate::host::Worker;
use crate::{Error, Host, Result};

/// Where a route leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Via {
    /// To a router, whose device the kernel finds by its address.
    Gateway(String),
    /// Out of a device, to neighbours there.
    Device(String),
    /// To a router behind a given device; it need not be in the device's prefix.
    GatewayOn(String, String),
    /// Spread over several routers with equal weight (ECMP). Which part of a packet chooses is the setting
    /// `net.ipv4.fib_multipath_hash_policy` (`net.ipv6.…`): 0 addresses, 1 ports too.
    Multipath(Vec<String>),
}

impl Via {
    /// [`Via::Gateway`].
    pub fn gateway(address: impl Into<String>) -> Self {
        Self::Gateway(address.into())
    }

    /// [`Via::Device`].
    pub fn device(name: impl Into<String>) -> Self {
        Self::Device(name.into())
    }

    /// [`Via::GatewayOn`].
    pub fn gateway_on(address: impl Into<String>, device: impl Into<String>) -> Self {
        Self::GatewayOn(address.into(), device.into())
    }

    /// [`Via::Multipath`].
    pub fn multipath<S: Into<String>>(gateways: impl IntoIterator<Item = S>) -> Self {
        Self::Multipath(gateways.into_iter().map(Into::into).collect())
    }
}

/// What a device has sent and received since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the kernel's (struct rtnl_link_stats64)")]
pub struct DeviceCounters {
    pub rx_packets: u64,
    pub rx_bytes: u64,
    pub rx_dropped: u64,
    pub rx_errors: u64,
    pub tx_packets: u64,
    pub tx_bytes: u64,
    pub tx_dropped: u64,
    pub tx_errors: u64,
}

/// The features of a veth device that leave work to hardware it does not have.
const OFFLOADS: [&str; 9] = [
    "tx-checksum-ip-generic",
    "tx-tcp-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp-mangleid-segmentation",
    "tx-tcp6-segmentation",
    "tx-udp-segmentation",
    "tx-generic-segmentation",
    "tx-scatter-gather",
    "rx-gro",
];

enum Prefix {
    V4(std::net::Ipv4Addr, u8),
    V6(std::net::Ipv6Addr, u8),
}

impl Host {
    /// Gives a device an address, for example `10.0.1.2/24` or `2001:db8::2/64`. It works at once: no duplicate
    /// address detection.
    ///
    /// # Errors
    /// It is not an address with a prefix length, or the kernel refuses it.
    pub fn address(&self, device: &str, address: &str) -> Result<()> {
        let prefix = prefix(address)?;
        let device = device.to_owned();
        self.request(format!("address {address} on {device}"), move |worker| {
            worker.runtime.block_on(async {
                match prefix {
                    Prefix::V4(address, bits) => {
                        worker.route.add_address(Ipv4Address::new(device, address, bits)).await
                    }
                    Prefix::V6(address, bits) => {
                        worker.route.add_address(Ipv6Address::new(device, address, bits).nodad()).await
                    }
                }
            })
        })
    }

    /// Adds a route to the main table, or replaces the one to the same destination; `0.0.0.0/0` and `::/0` are the
    /// default routes.
    ///
    /// # Errors
    /// A bad destination or gateway, or the kernel refuses it (a gateway that cannot be reached, for example).
    pub fn route(&self, destination: &str, via: Via) -> Result<()> {
        let what = format!("route {destination} {via:?}");
        match prefix(destination)? {
            Prefix::V4(address, bits) => {
                let route = route_v4(Ipv4Route::new(address, bits), via)?;
                self.request(what, move |w| w.runtime.block_on(w.route.replace_route(route)))
            }
            Prefix::V6(address, bits) => {
                let route = route_v6(Ipv6Route::new(address, bits), via)?;
                self.request(what, move |w| w.runtime.block_on(w.route.replace_route(route)))
            }
        }
    }

    /// Removes the route to `destination` from the main table.
    ///
    /// # Errors
    /// There is none, or a bad destination.
    pub fn remove_route(&self, destination: &str) -> Result<()> {
        let what = format!("removing the route {destination}");
        match prefix(destination)? {
            Prefix::V4(address, bits) => {
                // Otherwise the kernel would want the scope the route was added with.
                let route = Ipv4Route::new(address, bits).scope(RouteScope::Nowhere);
                self.request(what, move |w| w.runtime.block_on(w.route.del_route(route)))
            }
            Prefix::V6(address, bits) => {
                let route = Ipv6Route::new(address, bits);
                self.request(what, move |w| w.runtime.block_on(w.route.del_route(route)))
            }
        }
    }

    /// Joins devices to the bridge `name`, which is made if there is none, and takes it up.
    ///
    /// # Errors
    /// A device does not exist, or the kernel refuses.
    pub fn bridge(&self, name: &str, devices: &[&str]) -> Result<()> {
        let what = format!("bridge {name} of {}", devices.join(", "));
        let name = name.to_owned();
        let devices: Vec<String> = devices.iter().map(|&device| device.to_owned()).collect();
        self.request(what, move |worker| {
            worker.runtime.block_on(async {
                let route = &worker.route;
                if route.get_link_by_name(name.as_str()).await?.is_none() {
                    route.add_link(BridgeLink::new(name.as_str()).stp(false).forward_delay_ms(0)).await?;
                }
                for device in devices {
                    route.set_link_master(device, name.as_str()).await?;
                }
                route.set_link_up(name.as_str()).await
            })
        })
    }

    /// Takes a device up or down, as pulling its cable does.
    ///
    /// # Errors
    /// There is no such device.
    pub fn set_up(&self, device: &str, up: bool) -> Result<()> {
        let device = device.to_owned();
        let what = format!("{device} {}", if up { "up" } else { "down" });
        self.request(what, move |w| w.runtime.block_on(w.route.set_link_state(device, up)))
    }

    /// Changes a device's MTU, in bytes of an IP packet.
    ///
    /// # Errors
    /// There is no such device, or the kernel refuses the size.
    pub fn set_mtu(&self, device: &str, mtu: u32) -> Result<()> {
        let device = device.to_owned();
        let what = format!("MTU {mtu} on {device}");
        self.request(what, move |w| w.runtime.block_on(w.route.set_link_mtu(device, mtu)))
    }

    /// Switches a veth device's offloads off: it then sends packets of at most its MTU, with complete checksums.
    ///
    /// A program that reads a plain TUN or TAP device does not need this: the kernel segments packets and completes
    /// their checksums for a device that offers no offload, also those that came in over a veth with offloads on.
    /// A packet socket on the receiving veth does: there unfinished checksums and super-packets are seen.
    ///
    /// # Errors
    /// There is no such device, or the kernel lacks the ethtool netlink family.
    pub fn offloads_off(&self, device: &str) -> Result<()> {
        let what = format!("offloads of {device} off");
        let device = device.to_owned();
        self.request(what, move |worker| {
            worker.runtime.block_on(async {
                let ethtool = Connection::<Ethtool>::new_async().await?;
                let known = ethtool.get_features_by_name(&device).await?;
                ethtool
                    .set_features_by_name(&device, |features| {
                        let changeable = OFFLOADS.into_iter().filter(|name| known.is_changeable(name));
                        changeable.fold(features, FeaturesBuilder::disable)
                    })
                    .await
            })
        })
    }

    /// A device's counters.
    ///
    /// # Errors
    /// There is no such device.
    pub fn counters(&self, device: &str) -> Result<DeviceCounters> {
        let name = device.to_owned();
        let link = self.request(format!("counters of {device}"), move |worker| {
            worker.runtime.block_on(worker.route.get_link_by_name(name))
        })?;
        let Some(link) = link else {
            let expected = "the name of a device of this host";
            return Err(Error::Invalid { what: "device", given: device.to_owned(), expected });
        };
        Ok(link.stats().map_or_else(DeviceCounters::default, |stats| DeviceCounters {
            rx_packets: stats.rx_packets(),
            rx_bytes: stats.rx_bytes(),
            rx_dropped: stats.rx_dropped(),
            rx_errors: stats.rx_errors(),
            tx_packets: stats.tx_packets(),
            tx_bytes: stats.tx_bytes(),
            tx_dropped: stats.tx_dropped(),
            tx_errors: stats.tx_errors(),
        }))
    }

    /// The names of this host's devices, `lo` included.
    ///
    /// # Errors
    /// The lab is gone.
    pub fn devices(&self) -> Result<Vec<String>> {
        let links = self.request("listing devices", |w| w.runtime.block_on(w.route.get_links()))?;
        Ok(links.iter().filter_map(|link| link.name().map(str::to_owned)).collect())
    }

    pub(crate) fn request<T: Send + 'static>(
        &self,
        what: impl Into<String>,
        f: impl FnOnce(&Worker) -> nlink::Result<T> + Send + 'static,
    ) -> Result<T> {
        self.call(move |worker| Ok(f(worker)))?.map_err(Error::netlink(self.name(), what))
    }
}

fn route_v4(route: Ipv4Route, via: Via) -> Result<Ipv4Route> {
    let address = |text: String| parse::<std::net::Ipv4Addr>("IPv4 gateway", &text);
    Ok(match via {
        Via::Gateway(gateway) => route.gateway(address(gateway)?),
        Via::Device(device) => route.dev(device),
        Via::GatewayOn(gateway, device) => route.gateway(address(gateway)?).dev(device).onlink(),
        Via::Multipath(gateways) => {
            let hops = gateways.into_iter().map(|text| Ok(NextHop::new().gateway_v4(address(text)?)));
            route.multipath(hops.collect::<Result<_>>()?)
        }
    })
}

fn route_v6(route: Ipv6Route, via: Via) -> Result<Ipv6Route> {
    let address = |text: String| parse::<std::net::Ipv6Addr>("IPv6 gateway", &text);
    Ok(match via {
        Via::Gateway(gateway) => route.gateway(address(gateway)?),
        Via::Device(device) => route.dev(device),
        Via::GatewayOn(gateway, device) => route.gateway(address(gateway)?).dev(device).onlink(),
        Via::Multipath(gateways) => {
            let hops = gateways.into_iter().map(|text| Ok(NextHop::new().gateway_v6(address(text)?)));
            route.multipath(hops.collect::<Result<_>>()?)
        }
    })
}

fn parse<T: std::str::FromStr>(what: &'static str, text: &str) -> Result<T> {
    let expected = "an address of the destination's family, such as 10.0.1.1 or 2001:db8::1";
    text.parse().map_err(|_| Error::Invalid { what, given: text.to_owned(), expected })
}

fn prefix(text: &str) -> Result<Prefix> {
    let split = text.split_once('/').and_then(|(ip, bits)| Some((ip.parse().ok()?, bits.parse().ok()?)));
    match split {
        Some((IpAddr::V4(address), bits @ 0..=32)) => Ok(Prefix::V4(address, bits)),
        Some((IpAddr::V6(address), bits @ 0..=128)) => Ok(Prefix::V6(address, bits)),
        _ => {
            let expected = "an address and a prefix length, such as 10.0.1.2/24 or 2001:db8::2/64";
            Err(Error::Invalid { what: "prefix", given: text.to_owned(), expected })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_needs_an_address_and_a_length_that_fits() {
        assert!(matches!(prefix("10.0.0.1/24"), Ok(Prefix::V4(_, 24))));
        assert!(matches!(prefix("::/0"), Ok(Prefix::V6(_, 0))));
        for text in ["", "10.0.0.1", "10.0.0.1/33", "::1/129", "x/24", "10.0.0.1/", "10.0.0.1/-1", "default"]
        {
            assert!(prefix(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_gateway_of_the_other_family_is_refused() {
        let via = Via::gateway("2001:db8::1");
        assert!(route_v4(Ipv4Route::default_route(), via.clone()).is_err());
        assert!(route_v6(Ipv6Route::default_route(), via).is_ok());
    }
}
