//! What other people's firewall rules do to our packets, as far as it can be read from them.
//!
//! The listing is taken as plain JSON: a firewall may hold statements that no typed description of it knows yet, and
//! what is not understood here must not hide the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::process::Command;

use serde_json::Value;

use super::{Finding, Needs, Severity};
use crate::change::Change;
use crate::offload::End;

/// Our own tables' names begin so.
const OWN_TABLES: &str = "shunt_";

/// Everything about firewalls.
pub(super) fn examine(needs: &Needs) -> Vec<Finding> {
    let mut findings = legacy();
    match Command::new("nft").args(["-j", "list", "ruleset"]).output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => findings.push(Finding::new(
            Severity::Note,
            "firewall",
            "there is no program `nft`: the rules of this host's firewall were not looked at",
            "install nftables and ask again",
        )),
        Err(error) => findings.push(unreadable(&error.to_string())),
        Ok(output) if !output.status.success() => {
            findings.push(unreadable(String::from_utf8_lossy(&output.stderr).trim()));
        }
        Ok(output) => match Ruleset::parse(&output.stdout) {
            Ok(ruleset) => findings.extend(ruleset.examine(needs)),
            Err(error) => findings.push(unreadable(&error.to_string())),
        },
    }
    findings
}

fn unreadable(why: &str) -> Finding {
    Finding::new(
        Severity::Warning,
        "firewall",
        format!("the rules of this host's firewall cannot be listed: {why}"),
        "run this as root",
    )
}

/// Rules of the kind that nftables does not list.
fn legacy() -> Vec<Finding> {
    let in_use = |path: &str| {
        let names = fs::read_to_string(path).unwrap_or_default();
        names.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let families = [("/proc/net/ip_tables_names", "iptables"), ("/proc/net/ip6_tables_names", "ip6tables")];
    let used = families.map(|(path, program)| (in_use(path), program));
    used.into_iter()
        .filter(|(tables, _)| !tables.is_empty())
        .map(|(tables, program)| {
            Finding::new(
                Severity::Warning,
                "firewall",
                format!("legacy {program} tables are in use, which cannot be read here: {}", tables.join(", ")),
                format!("see with `{program}-legacy-save` that nothing there drops forwarded packets, or sets marks"),
            )
        })
        .collect()
}

/// A chain and the rules in it.
#[derive(Debug, Default)]
struct Chain {
    hook: Option<String>,
    policy_drop: bool,
    /// The statements of each rule.
    rules: Vec<Value>,
}

/// Where a chain is: family, table, name.
type Place = (String, String, String);

#[derive(Debug, Default)]
pub(super) struct Ruleset {
    chains: BTreeMap<Place, Chain>,
}

impl Ruleset {
    /// Reads what `nft -j list ruleset` prints, without our own tables.
    pub(super) fn parse(listing: &[u8]) -> Result<Self, serde_json::Error> {
        let listing: Value = serde_json::from_slice(listing)?;
        let objects = listing.get("nftables").and_then(Value::as_array).cloned().unwrap_or_default();
        let text = |of: &Value, key: &str| of.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let mut chains: BTreeMap<Place, Chain> = BTreeMap::new();
        for object in &objects {
            if let Some(chain) = object.get("chain") {
                let place = (text(chain, "family"), text(chain, "table"), text(chain, "name"));
                let known = chains.entry(place).or_default();
                known.hook = chain.get("hook").and_then(Value::as_str).map(str::to_owned);
                known.policy_drop = text(chain, "policy") == "drop";
            } else if let Some(rule) = object.get("rule") {
                let place = (text(rule, "family"), text(rule, "table"), text(rule, "chain"));
                let statements = rule.get("expr").cloned().unwrap_or_default();
                chains.entry(place).or_default().rules.push(statements);
            }
        }
        chains.retain(|(_, table, _), _| !table.starts_with(OWN_TABLES));
        Ok(Self { chains })
    }

    pub(super) fn examine(&self, needs: &Needs) -> Vec<Finding> {
        let mut findings = self.forwarding(needs);
        findings.extend(self.input(needs));
        findings.extend(self.marks(needs));
        if self.chains.values().flat_map(|chain| &chain.rules).any(|rule| contains_key(rule, "xt")) {
            findings.push(Finding::new(
                Severity::Note,
                "firewall",
                "some rules were made by iptables-nft and cannot be read here",
                "see with `iptables-nft-save` that they neither drop forwarded packets nor set marks",
            ));
        }
        if findings.is_empty() {
            findings
                .push(Finding::good("firewall", "no rule that can be read drops or re-marks our packets"));
        }
        findings
    }

    fn at<'a>(&'a self, hook: &'a str) -> impl Iterator<Item = (&'a Place, &'a Chain)> {
        self.chains.iter().filter(move |((family, ..), chain)| {
            chain.hook.as_deref() == Some(hook) && matches!(family.as_str(), "ip" | "ip6" | "inet")
        })
    }

    /// All rules of a chain's table, which it may jump to.
    fn table_of(&self, place: &Place) -> impl Iterator<Item = &Value> {
        let (family, table, _) = place.clone();
        self.chains
            .iter()
            .filter(move |((of, name, _), _)| *of == family && *name == table)
            .flat_map(|(_, chain)| &chain.rules)
    }

    /// Packets between our devices and the network are forwarded.
    fn forwarding(&self, needs: &Needs) -> Vec<Finding> {
        let devices: BTreeSet<&str> = needs
            .changes
            .iter()
            .filter_map(|change| match change {
                Change::Link(link) => Some(link.interface.as_str()),
                _ => None,
            })
            .collect();
        let mut findings = Vec::new();
        for (place, chain) in self.at("forward").filter(|(_, chain)| chain.drops()) {
            let unnamed =
                devices.iter().filter(|device| !self.table_of(place).any(|rule| names(rule, device)));
            let (family, table, name) = place;
            let at = format!("{family} {table} {name}");
            let (mut missing, mut mend) = (Vec::new(), Vec::new());
            for device in unnamed {
                missing.push((*device).to_owned());
                mend.extend(
                    ["iifname", "oifname"].map(|end| format!("nft insert rule {at} {end} {device} accept")),
                );
            }
            // The kernel forwards these by itself.
            for (end, address) in &needs.forwards {
                let text = address.to_string();
                let of = if address.is_ipv4() { "ip" } else { "ip6" };
                if (family != "inet" && family != of) || self.table_of(place).any(|rule| names(rule, &text)) {
                    continue;
                }
                let field = match end {
                    End::Source => "saddr",
                    End::Destination => "daddr",
                };
                missing.push(text);
                mend.push(format!("nft insert rule {at} {of} {field} {address} accept"));
            }
            if !missing.is_empty() {
                let missing = missing.join(", ");
                findings.push(Finding::new(
                    if chain.accepts_some() { Severity::Warning } else { Severity::Error },
                    "firewall",
                    format!(
                        "the chain `{at}` drops what it does not know, and no rule there names {missing}"
                    ),
                    format!("`{}`, in the firewall's own files to make it last", mend.join("; ")),
                ));
            }
        }
        findings
    }

    /// Clients reach the ports of this host.
    fn input(&self, needs: &Needs) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (place, _) in self.at("input").filter(|(_, chain)| chain.drops()) {
            for port in
                needs.ports.iter().filter(|port| !self.table_of(place).any(|rule| has_port(rule, **port)))
            {
                let (family, table, name) = place;
                let at = format!("{family} {table} {name}");
                findings.push(Finding::new(
                    Severity::Warning,
                    "firewall",
                    format!("the chain `{at}` drops what it does not know, and no rule there names TCP port {port}"),
                    format!("`nft insert rule {at} tcp dport {port} accept`"),
                ));
            }
        }
        findings
    }

    /// Whoever sets a mark as a whole takes ours away.
    fn marks(&self, needs: &Needs) -> Vec<Finding> {
        if !needs.changes.iter().any(|change| matches!(change, Change::Divert(_))) {
            return Vec::new();
        }
        let rewrites = |rule: &Value| {
            let statements = rule.as_array().into_iter().flatten();
            statements.filter_map(|statement| statement.get("mangle")).any(|mangle| {
                mangle.get("key").is_some_and(is_mark) && !mangle.get("value").is_some_and(contains_mark)
            })
        };
        self.chains
            .iter()
            .filter(|(_, chain)| chain.rules.iter().any(rewrites))
            .map(|((family, table, name), _)| {
                let mask = needs.options.mark_mask;
                Finding::new(
                    Severity::Warning,
                    "marks",
                    format!("the chain `{family} {table} {name}` sets packets' marks as a whole, our bits too"),
                    format!(
                        "let it keep our bits: `meta mark set meta mark and {mask:#010x} or N`, or keep it off the shared \
                         addresses' packets"
                    ),
                )
            })
            .collect()
    }
}

impl Chain {
    /// Whether it drops what none of its rules decides on.
    fn drops(&self) -> bool {
        let verdict = |rule: &Value, key| rule.as_array().into_iter().flatten().any(|s| s.get(key).is_some());
        let last = self.rules.iter().rev().find(|rule| verdict(rule, "drop") || verdict(rule, "reject"));
        let unconditional = last.is_some_and(|rule| !verdict(rule, "match"));
        let accepts_all = self
            .rules
            .iter()
            .any(|rule| verdict(rule, "accept") && !verdict(rule, "match") && !verdict(rule, "xt"));
        (self.policy_drop || unconditional) && !accepts_all
    }

    /// Whether something there may accept what we do not know of.
    fn accepts_some(&self) -> bool {
        let keys = ["accept", "jump", "goto", "vmap", "xt", "queue"];
        self.rules.iter().any(|rule| keys.iter().any(|key| contains_key(rule, key)))
    }
}

fn is_mark(value: &Value) -> bool {
    value.pointer("/meta/key").and_then(Value::as_str) == Some("mark")
}

fn contains_mark(value: &Value) -> bool {
    any(value, &is_mark)
}

fn contains_key(value: &Value, key: &str) -> bool {
    any(value, &|value| value.get(key).is_some())
}

/// Whether a device is named, also by a prefix such as `shunt*`.
fn names(rule: &Value, device: &str) -> bool {
    any(rule, &|value| {
        value.as_str().is_some_and(|name| match name.strip_suffix('*') {
            Some(prefix) => !prefix.is_empty() && device.starts_with(prefix),
            None => name == device,
        })
    })
}

fn has_port(rule: &Value, port: u16) -> bool {
    let port = u64::from(port);
    any(rule, &|value| {
        if value.as_u64() == Some(port) {
            return true;
        }
        let ends = value.get("range").and_then(Value::as_array);
        let ends: Option<Vec<u64>> = ends.map(|ends| ends.iter().filter_map(Value::as_u64).collect());
        matches!(ends.as_deref(), Some([first, last]) if (*first..=*last).contains(&port))
    })
}

/// Whether `wanted` holds for a value or anything within it.
fn any(value: &Value, wanted: &dyn Fn(&Value) -> bool) -> bool {
    wanted(value)
        || match value {
            Value::Array(values) => values.iter().any(|value| any(value, wanted)),
            Value::Object(values) => values.values().any(|value| any(value, wanted)),
            _ => false,
        }
}
