//! The thinnest whole path: curl, nginx, shim, balancer, agents.

mod common;

use common::{Family, Net, Options};

#[test]
fn curl_is_redirected_to_a_service_port_in_both_families() {
    let mut net = Net::new(Options::default());
    net.start_nginx();
    net.start_shim("auto");
    for family in Family::BOTH {
        for _ in 0..20 {
            let fetched = net.curl(family, "/", &[]);
            assert!(fetched.ok, "{fetched:?}\n{}", net.logs());
            assert!(fetched.redirected(), "{fetched:?}\n{}", net.logs());
        }
    }
    net.stop_shim();
}

#[test]
fn without_a_shim_plain_clients_are_served() {
    let mut net = Net::new(Options::default());
    net.start_nginx();
    for family in Family::BOTH {
        for _ in 0..20 {
            let fetched = net.curl(family, "/", &[]);
            assert!(fetched.ok && !fetched.redirected(), "{fetched:?}\n{}", net.logs());
        }
    }
}
