//! Other people's policy rules, marks and route tables.

use nlink::netlink::messages::RuleMessage;
use nlink::netlink::types::route::RouteProtocol;

use super::addresses::unanswered;
use super::{Finding, Needs, Severity};
use crate::error::HostError;
use crate::kernel::{self, is_own_origin};
use crate::options::PREFERENCES;
use crate::prefix::Family;

/// What may decide before us, mistake its mark for ours, or use our tables.
pub(super) async fn policy(needs: &Needs) -> Vec<Finding> {
    match look(needs).await {
        Ok(findings) if findings.is_empty() => {
            vec![Finding::good("rules", "no other policy rule, mark or route gets in the way")]
        }
        Ok(findings) => findings,
        Err(error) => vec![unanswered("rules", &error)],
    }
}

async fn look(needs: &Needs) -> Result<Vec<Finding>, HostError> {
    let netlink = kernel::connect()?;
    let mut findings = Vec::new();
    for rule in kernel::rules(&netlink).await? {
        // The kernel's own first rule is moved away by the daemon.
        let is_first = kernel::is_plain_local(&rule) && rule.priority() == 0;
        if !is_first && !is_own_origin(rule.protocol()) {
            findings.extend(foreign_rule(needs, &rule));
        }
    }
    let options = &needs.options;
    let ours = RouteProtocol::from(options.protocol());
    let routes = netlink.get_routes().await.map_err(|error| HostError::netlink("list the routes", error))?;
    let taken = routes
        .iter()
        .filter(|route| options.tables().contains(&route.table_id()) && route.protocol() != ours);
    // IPv6 lists addresses of our own devices in their tables, too.
    let mut tables: Vec<u32> = taken
        .filter(|route| !route.is_system_generated())
        .map(nlink::netlink::messages::RouteMessage::table_id)
        .collect();
    tables.sort_unstable();
    tables.dedup();
    findings.extend(tables.into_iter().map(|table| {
        Finding::new(
            Severity::Error,
            "tables",
            format!("route table {table} is in use by somebody else"),
            format!(
                "write `[host]` and `table = N`, the first of {} tables that nobody uses",
                options.tables().len()
            ),
        )
    }));
    Ok(findings)
}

fn foreign_rule(needs: &Needs, rule: &RuleMessage) -> Option<Finding> {
    let options = &needs.options;
    let family = if rule.is_ipv4() { Family::V4 } else { Family::V6 };
    let place = format!("the {family} policy rule with preference {}", rule.priority());
    if kernel::is_plain_local(rule) && rule.priority() < kernel::LOCAL_PREFERENCE {
        return Some(Finding::new(
            Severity::Error,
            "rules",
            format!("{place} looks up the local table, before any rule of ours"),
            format!(
                "`ip {family_flag} rule del pref {0} lookup local; ip {family_flag} rule add pref 0 lookup local`",
                rule.priority(),
                family_flag = flag(family)
            ),
        ));
    }
    if let Some(mark) = rule.fwmark().filter(|mark| *mark != 0) {
        let mask = rule.fwmask().unwrap_or(u32::MAX);
        // It takes our packets if it can match a packet with our bits set.
        let overlaps = mask & options.mark_mask & (mark ^ options.mark) == 0 && mask & options.mark_mask != 0;
        if overlaps && rule.priority() < options.preferences().end {
            return Some(Finding::new(
                Severity::Error,
                "marks",
                format!("{place} takes packets with our mark {:#x}/{:#x}", options.mark, options.mark_mask),
                "write `[host]`, `mark = N` and `mark_mask = N` with bits that nobody uses",
            ));
        }
    }
    (rule.priority() < options.preferences().end && may_match(rule)).then(|| {
        Finding::new(
            Severity::Warning,
            "rules",
            format!("{place} comes before ours and decides first over the packets that it matches"),
            format!(
                "if those are packets of the shared addresses: move it behind {}, or write `[host]` and `preference = N` \
                 with {PREFERENCES} free places before it",
                options.preferences().end
            ),
        )
    })
}

/// Whether it is about packets in general, not about marked ones alone.
fn may_match(rule: &RuleMessage) -> bool {
    rule.fwmark().is_none_or(|mark| mark == 0) || rule.is_invert()
}

fn flag(family: Family) -> &'static str {
    if family == Family::V4 { "-4" } else { "-6" }
}
