//! The configuration files of the demo's daemons, as an operator would write them.

use std::fmt::Write as _;

use super::plan::{Family, SERVERS, SHARED_PORT, server_address, server_name, service_port};

/// What the balancer is told about a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Absent,
    Up,
    Drain,
}

/// The balancer's file.
pub(crate) fn balancer(family: Family, states: [State; SERVERS]) -> String {
    let mut text = format!(
        "role = \"balancer\"\nvips = [\"{}\"]\nlegacy = \"hash\"\nforward = \"network\"\n\n\
         [[service]]\nname = \"web\"\nredirect_port = {SHARED_PORT}\n",
        family.vip()
    );
    for (server, state) in states.into_iter().enumerate() {
        let state = match state {
            State::Absent => continue,
            State::Up => "up",
            State::Drain => "drain",
        };
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "\n[[server]]\nname = \"{}\"\naddress = \"{}\"\nports = {{ web = {} }}\nstate = \"{state}\"\n",
            server_name(server),
            server_address(family, server),
            service_port(server),
        );
    }
    text
}

/// The client's file.
pub(crate) fn client(family: Family) -> String {
    format!("role = \"client\"\n\n[[vip]]\naddress = \"{}\"\n", family.vip())
}

/// A server's file.
pub(crate) fn server(family: Family, server: usize) -> String {
    format!(
        "role = \"server\"\ninterface = \"eth0\"\naddresses = [\"{}\"]\n\n\
         [[service]]\nname = \"web\"\nredirect_port = {SHARED_PORT}\nservice_port = {}\n",
        server_address(family, server),
        service_port(server)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use shunt_host::Source;

    #[test]
    fn the_daemons_take_their_files() {
        for family in [Family::V4, Family::V6] {
            let states = [State::Up, State::Drain, State::Up, State::Absent];
            let text = balancer(family, states);
            assert_eq!(text.matches("[[server]]").count(), 3);
            shunt_balancer::Config::parse(&Source::new("balancer.toml", text)).unwrap();
            shunt_client_shim::Config::from_source(&Source::new("client.toml", client(family))).unwrap();
            let text = server(family, 0);
            shunt_server_agent::Config::from_source(&Source::new("server.toml", text)).unwrap();
        }
    }
}
