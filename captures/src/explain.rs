//! The rules of PROTOCOL.md behind what the two ends count.

/// The rule under which an end counts something.
pub(crate) fn counter_rule(name: &str) -> Option<&'static str> {
    const RULES: [(&str, &[&str]); 20] = [
        ("C1", &["asked", "ineligible", "unfit_syns"]),
        ("C2", &["plain_unconfirmed", "plain_echoed"]),
        ("C3", &["plain_refused", "too_many_hops", "bad_checksums"]),
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
        ("S6", &["not_listening"]),
        ("S7", &["challenge_acks"]),
        ("S8", &["resets", "replies_limited"]),
        ("I2", &["icmp_turned"]),
    ];
    let rule = RULES.iter().find(|(_, names)| names.contains(&name)).map(|(rule, _)| *rule);
    rule.or_else(|| match name {
        _ if name.starts_with("move") || name.starts_with("redirects") => Some("§4"),
        _ if name.starts_with("rebind") => Some("§5"),
        _ => None,
    })
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
