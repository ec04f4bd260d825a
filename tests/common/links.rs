//! Other ways for servers to be linked to the balancer: a switch, links that can be pulled out, a tree.

use std::process::Command;
use std::time::Duration;

use shunt_lab::{Impairment, LinkOptions};

use super::{Net, route_both};

impl Net {
    /// A switch with the balancer, 10.3.0.1, and the router towards clients, 10.3.0.254, on it.
    pub(super) fn plug_switch(&mut self) {
        let switch = self.lab.host("switch").expect("a namespace");
        for (host, device, last, last6) in
            [(&self.balancer, "eth1", 1, "1"), (&self.middle, "eth2", 254, "fe")]
        {
            let port = format!("to-{}", host.name());
            self.lab.link(&switch, &port, host, device, LinkOptions::default()).expect("a link");
            switch.bridge("br0", &[&port]).expect("a bridge port");
            host.address(device, &format!("10.3.0.{last}/24")).expect("an address");
            host.address(device, &format!("fd00:3::{last6}/64")).expect("an address");
        }
        self.switch = Some(switch);
    }

    /// balancer - lower1, lower2; each with 10.3.0.1 towards its servers.
    pub(super) fn grow(&mut self) {
        for number in 1..=2 {
            let host = self.lab.host(&format!("lower{number}")).expect("a namespace");
            let (down, clean) = (format!("down{number}"), Impairment::default());
            let link =
                self.lab.impaired_link(&self.balancer, &down, &host, "up0", clean).expect("an impaired link");
            for (host, device, last) in [(&self.balancer, down.as_str(), 1), (&host, "up0", 2)] {
                host.address(device, &format!("10.{}.0.{last}/24", 10 + number)).expect("an address");
                host.address(device, &format!("fd00:{}::{last}/64", 10 + number)).expect("an address");
            }
            route_both(&host, &format!("10.{}.0.1", 10 + number), &format!("fd00:{}::1", 10 + number));
            host.sysctl("net.ipv4.ip_forward", "1").expect("a sysctl");
            host.sysctl("net.ipv6.conf.all.forwarding", "1").expect("a sysctl");
            self.lowers.push((host, link));
        }
    }

    /// The lower host of a server, in a tree.
    pub fn lower_of(&self, number: u16) -> usize {
        usize::from(number > self.options.servers / 2)
    }

    /// Whether it is the first server of its router.
    pub(super) fn is_first(&self, number: u16) -> bool {
        number == 1 || self.options.tree && self.lower_of(number) != self.lower_of(number - 1)
    }

    /// Puts in the link from the balancer to a server.
    pub fn plug(&self, number: u16) {
        let patch = self.switch.as_ref().expect("a network with connectors");
        let (device, port) = (format!("back{number}"), format!("front{number}"));
        self.lab.link(&self.balancer, &device, patch, &port, LinkOptions::default()).expect("a link");
        patch.bridge(&format!("br{number}"), &[&port]).expect("a bridge port");
        self.balancer.address(&device, "10.3.0.1/32").expect("an address");
        self.balancer.address(&device, "fd00:3::1/128").expect("an address");
        // The server's way back is to another MAC now.
        if let Some(server) = self.servers.iter().find(|server| server.number == number) {
            let mut command = Command::new("ip");
            command.args(["neigh", "flush", "dev", "eth0"]);
            server.host.run_within(&mut command, Duration::from_secs(10)).expect("ip is installed");
        }
    }

    /// Pulls it out: the device is no more.
    pub fn unplug(&self, number: u16) {
        let mut command = Command::new("ip");
        command.args(["link", "del", &format!("back{number}")]);
        let output =
            self.balancer.run_within(&mut command, Duration::from_secs(10)).expect("ip is installed");
        assert!(output.status.success(), "{output:?}");
    }
}
