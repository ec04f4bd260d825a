//! The words for what the roles decide: rules of PROTOCOL.md, and sentences.

use shunt_balancer::route::Decision as By;
use shunt_balancer::{Balancer, DropReason, Output, Route, ServerId};
use shunt_stack::redirect::{ClientEvent, DeclineReason, PlainReason, RedirectOutcome, ServerEvent};

use crate::row::Decision;

/// What a balancer has decided.
pub(crate) fn balancer(
    balancer: &Balancer,
    route: Result<Route, DropReason>,
    done: Result<Output, DropReason>,
) -> Decision {
    match (route, done) {
        (Ok(route), Ok(_)) => Decision {
            name: route.name().to_owned(),
            rule: Some(route_rule(route)),
            why: whom(balancer, route),
        },
        (Err(reason), _) | (_, Err(reason)) => Decision {
            name: reason.name().to_owned(),
            rule: Some(drop_rule(reason)),
            why: format!("dropped: {reason}"),
        },
    }
}

fn route_rule(route: Route) -> &'static str {
    match route {
        Route::ToServer { decision, .. } => match decision {
            By::Selected => "B1",
            By::Owner => "B2",
            By::LegacyHash | By::LegacyServer => "B3",
            By::Datagram => "§6",
            By::Fragment => "§9",
            By::Balanced | By::Named => "I4",
            By::ErrorOwner | By::ErrorHash | By::ErrorLegacyServer => "I1",
            By::Default(_) => "B4",
        },
        Route::ToClient { .. } | Route::Unchanged => "B5",
        Route::ErrorToClient { .. } => "I5",
        Route::Answer => "I4",
        Route::Redirect { .. } => "B1",
        Route::TooBig { .. } => "I3",
    }
}

fn drop_rule(reason: DropReason) -> &'static str {
    match reason {
        DropReason::NoServer(_) | DropReason::NoPortlessServer(_) | DropReason::NoConnector(_) => "B7",
        DropReason::Legacy(_) => "B3",
        DropReason::LaterFragment(_) | DropReason::OverlappingFragment(_) => "§9",
        DropReason::Unanswerable | DropReason::AnswerLimit => "I4",
        DropReason::Limited(_) => "B6",
        DropReason::TooBig(_) | DropReason::Tunnel(_) => "I3",
        DropReason::Token(_) => "T4",
        _ => "B4",
    }
}

fn whom(balancer: &Balancer, route: Route) -> String {
    let name = |server: ServerId| balancer.server_name(server).unwrap_or("?").to_owned();
    match route {
        Route::ToServer { server, decision: By::Default(reason) } => {
            format!("default server {}, because of {reason}", name(server))
        }
        Route::ToServer { server, .. } => format!("server {}", name(server)),
        Route::ToClient { server, .. } => format!("of server {}", name(server)),
        Route::ErrorToClient { server, .. } => format!("about a packet for server {}", name(server)),
        Route::Redirect { server, port } => format!("server {}, port {port}", name(server)),
        Route::TooBig { mtu } => format!("{mtu} bytes would fit"),
        Route::Answer | Route::Unchanged => String::new(),
    }
}

/// The rule under which an end counts something.
pub(crate) fn counter_rule(name: &str) -> Option<&'static str> {
    const RULES: [(&str, &[&str]); 17] = [
        ("C1", &["asked", "ineligible"]),
        ("C2", &["plain_unconfirmed", "plain_echoed"]),
        ("C3", &["plain_refused", "too_many_hops"]),
        ("C4", &["stray_syn_acks"]),
        ("C5", &["reconnected"]),
        ("C6", &["plain_silence", "plain_service_port", "remembered_plain"]),
        ("C8", &["port_collisions"]),
        ("C9", &["dropped_resets"]),
        ("C10", &["handed_over", "handovers_completed", "handovers_failed", "probes"]),
        ("C12", &["table_full"]),
        (
            "S1",
            &[
                "syns_turned",
                "syns_to_service",
                "syn_acks_moved",
                "syn_acks_confirmed",
                "confirmed",
                "plain_syns",
            ],
        ),
        ("S2", &["answered", "answered_elsewhere"]),
        ("S5", &["syn_acks_unknown", "half_open_evicted", "half_open_expired"]),
        ("W1", &["malformed_options", "bad_options"]),
        ("W2", &["syn_acks_no_room"]),
        ("T4", &["tokens_missing", "tokens_unknown_key", "tokens_expired", "tokens_mismatch"]),
        ("I2", &["icmp_turned"]),
    ];
    const MORE: [(&str, &[&str]); 4] = [
        ("S6", &["not_listening"]),
        ("S7", &["challenge_acks"]),
        ("S8", &["resets", "replies_limited"]),
        ("C1", &["unfit_syns"]),
    ];
    let rule = RULES.iter().chain(&MORE).find(|(_, names)| names.contains(&name)).map(|(rule, _)| *rule);
    rule.or_else(|| match name {
        _ if name.starts_with("move") || name.starts_with("redirects") => Some("§4"),
        _ if name.starts_with("rebind") => Some("§5"),
        _ => None,
    })
}

/// A client's event as a sentence.
pub(crate) fn client_event(event: &ClientEvent) -> String {
    match event {
        ClientEvent::Redirected { service_port, handover, .. } => {
            let how = if *handover { "handover" } else { "reconnect" };
            format!("goes on at {service_port} by {how}")
        }
        ClientEvent::Confirmed { vip, .. } => format!("confirmed at {}", vip.port()),
        ClientEvent::Plain { reason, .. } => format!("goes on plainly: {}", plain(*reason)),
        ClientEvent::HandoverFailed { service_port, .. } => format!("the handover to {service_port} failed"),
        ClientEvent::MoveAsked { from, to, .. } => format!("asked to move from {from} to {to}"),
        ClientEvent::Hint { from, to, .. } => format!("asked to move from {from} to {to}: it stays"),
        ClientEvent::Rebound { port, .. } => format!("its own port is {port} from now on"),
        ClientEvent::RebindFailed { port, .. } => format!("own port {port} was not confirmed"),
    }
}

fn plain(reason: PlainReason) -> &'static str {
    match reason {
        PlainReason::Unconfirmed => "the SYN-ACK has no C",
        PlainReason::Echoed => "the SYN-ACK has our own option",
        PlainReason::Refused => "the redirect is not to be obeyed",
        PlainReason::Silence => "nothing answers SYNs with the option",
        PlainReason::ServicePort => "the service port refuses or is silent",
    }
}

/// A server's event as a sentence.
pub(crate) fn server_event(event: &ServerEvent) -> String {
    match event {
        ServerEvent::Answered { port, .. } => format!("sent to {port}, to reconnect"),
        ServerEvent::HandedOver { port, .. } => format!("sent to {port}, to hand over"),
        ServerEvent::Confirmed { moved_from: Some(from), .. } => format!("confirmed, moved from {from}"),
        ServerEvent::Confirmed { service, .. } => format!("confirmed at {}", service.port()),
        ServerEvent::Redirection { to, outcome, .. } => format!("move to {to}: {}", end(*outcome)),
        ServerEvent::Rebound { port, .. } => format!("the client has port {port} from now on"),
        ServerEvent::Load { demanded: true } => "tokens are demanded from now on".to_owned(),
        ServerEvent::Load { demanded: false } => "tokens are no longer demanded".to_owned(),
        ServerEvent::Declined { reason, .. } => format!("left plain: {}", declined(*reason)),
    }
}

fn end(outcome: RedirectOutcome) -> &'static str {
    match outcome {
        RedirectOutcome::Confirmed => "confirmed",
        RedirectOutcome::Closed => "closed without",
        RedirectOutcome::GivenUp => "given up",
        RedirectOutcome::Reset => "reset",
    }
}

fn declined(reason: DeclineReason) -> &'static str {
    match reason {
        DeclineReason::NotListening => "nobody listens on the service port",
        DeclineReason::TooManyHops => "redirected too often",
        DeclineReason::NoRoom => "no room for the option",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use shunt_stack::redirect::{ClientCounters, ServerCounters};

    use super::*;

    #[test]
    fn every_counter_has_its_rule_or_needs_none() {
        let names = |value: Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
        let client = names(serde_json::to_value(ClientCounters::default()).unwrap());
        let server = names(serde_json::to_value(ServerCounters::default()).unwrap());
        let without: Vec<&String> =
            client.iter().chain(&server).filter(|name| counter_rule(name).is_none()).collect();
        assert_eq!(without, ["events_dropped", "unexpected", "overflowed", "passed"]);
    }
}
