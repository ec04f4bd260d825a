//! How a server is reached, as the mode needs it: address, device, next hop.

use std::net::IpAddr;

use shunt_stack::wire::gue;
use toml::Spanned;

use super::check::{Checker, Result};
use super::file::{GueTable, ServerTable};
use super::{ForwardMode, Server};

impl Checker<'_> {
    /// The link that servers share, `datalink` mode.
    pub(super) fn link<'a>(&self, written: Option<&'a Spanned<String>>) -> Result<Option<&'a str>> {
        let Some(link) = written else { return Ok(None) };
        if self.forward != ForwardMode::Datalink {
            return self.fail(link.span(), "only `forward = \"datalink\"` has a link that servers share");
        }
        self.interface(link)?;
        Ok(Some(link.get_ref().as_str()))
    }

    /// The UDP port of tunnels, `gue` mode.
    pub(super) fn gue(&self, table: Option<&Spanned<GueTable>>) -> Result<u16> {
        let Some(table) = table else { return Ok(gue::PORT) };
        if self.forward != ForwardMode::Gue {
            return self.fail(table.span(), "only `forward = \"gue\"` has tunnels");
        }
        match &table.get_ref().port {
            Some(port) if *port.get_ref() == 0 => self.fail(port.span(), "port 0 cannot be used"),
            port => Ok(port.as_ref().map_or(gue::PORT, |port| *port.get_ref())),
        }
    }

    fn interface(&self, name: &Spanned<String>) -> Result<()> {
        let text = name.get_ref();
        let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':');
        if text.is_empty() || text.len() > 15 || matches!(text.as_str(), "." | "..") || text.contains(bad) {
            return self.fail(name.span(), format!("{text:?} cannot be an interface's name"));
        }
        Ok(())
    }

    /// Address, device and gateway, as the mode needs them.
    pub(super) fn connection(
        &self,
        table: &ServerTable,
        link: Option<&str>,
        server: &mut Server,
        vips: &[IpAddr],
    ) -> Result<()> {
        if let Some(device) = &table.device {
            self.interface(device)?;
        }
        match self.forward {
            ForwardMode::Network => {
                self.needs_address(table, server)?;
                let span = table.device.as_ref().map(Spanned::span);
                match span.or(table.gateway.as_ref().map(Spanned::span)) {
                    Some(span) => {
                        self.fail(span, "only `forward = \"direct\"` uses it; the host's routes decide")
                    }
                    None => Ok(()),
                }
            }
            ForwardMode::Direct => {
                let Some(device) = &table.device else {
                    let message = format!(
                        "the server {:?} has no `device`, which `forward = \"direct\"` needs",
                        server.name
                    );
                    return self.fail(table.name.span(), message);
                };
                server.device = Some(device.get_ref().clone());
                server.gateways = self.addresses(table.gateway.as_ref(), vips)?;
                Ok(())
            }
            ForwardMode::Gue => {
                self.needs_address(table, server)?;
                let span = table.device.as_ref().map(Spanned::span);
                if let Some(span) = span.or(table.gateway.as_ref().map(Spanned::span)) {
                    return self.fail(span, "tunnels follow the host's routes");
                }
                // Whatever the tunnel's family, both families go in.
                server.ends = std::mem::take(&mut server.addresses);
                Ok(())
            }
            ForwardMode::Datalink => {
                self.needs_address(table, server)?;
                if let Some(gateway) = &table.gateway {
                    let message = "with `forward = \"datalink\"` a server is on the link itself: `address` is its own there; \
                                   behind a router, use `forward = \"direct\"`";
                    return self.fail(gateway.span(), message);
                }
                let Some(device) = table.device.as_ref().map(|device| device.get_ref().as_str()).or(link)
                else {
                    let message = format!(
                        "no link leads to the server {:?}: add `link = \"INTERFACE\"` for all servers, or its own `device`",
                        server.name
                    );
                    return self.fail(table.name.span(), message);
                };
                server.device = Some(device.to_owned());
                Ok(())
            }
        }
    }

    fn needs_address(&self, table: &ServerTable, server: &Server) -> Result<()> {
        if server.addresses.is_empty() {
            return self.fail(table.name.span(), format!("the server {:?} has no `address`", server.name));
        }
        Ok(())
    }
}
