//! Answers as tables for people.

use std::fmt::Write as _;

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, ContentArrangement, Table};
use serde_json::Value;

/// Any value without quotes; lists with spaces, nothing as a dash.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(list) if list.is_empty() => "-".to_owned(),
        Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join(" "),
        Value::Object(map) => {
            map.iter().map(|(key, value)| format!("{key}={}", text(value))).collect::<Vec<_>>().join(" ")
        }
        other => other.to_string(),
    }
}

fn table(header: &[&str], numbers: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled).set_header(header);
    for &index in numbers {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    if let Some(first) = table.column_mut(0) {
        first.set_padding((0, 1));
    }
    table
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn finished(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// The answer to `show` of any role.
pub(super) fn show(value: &Value) -> String {
    match value["role"].as_str() {
        Some("balancer") => balancer(value),
        Some("server") => server(value),
        Some("client") => client(value),
        _ => format!("{value:#}\n"),
    }
}

fn balancer(value: &Value) -> String {
    let mut out = format!(
        "balancer of {}: forward {}, legacy {}, default server {}\n{}\n",
        text(&value["vips"]),
        text(&value["forward"]),
        text(&value["legacy"]),
        text(&value["default_server"]),
        offload(&value["offload"]),
    );
    let mut services = table(&["SERVICE", "PORT", "POLICY", "CHECK", "SERVERS", "TAKING NEW"], &[1, 4, 5]);
    for service in list(&value["services"]) {
        services.add_row([
            text(&service["name"]),
            text(&service["redirect_port"]),
            text(&service["policy"]),
            text(&service["check"]["kind"]),
            text(&service["servers"]),
            text(&service["taking"]),
        ]);
    }
    let header =
        ["SERVER", "STATE", "HEALTH", "WEIGHT", "ADDRESS", "PORTS", "SELECTED", "PLAIN", "PACKETS", "BACK"];
    let mut servers = table(&header, &[3, 6, 7, 8, 9]);
    let mut failures = String::new();
    for server in list(&value["servers"]) {
        let counters = &server["counters"];
        let address = if list(&server["addresses"]).count() == 0 { "device" } else { "addresses" };
        // Of a link that is there nothing has to be said.
        let link = Some(&server["link"]).filter(|link| link.as_str().is_some_and(|link| link != "there"));
        servers.add_row([
            text(&server["name"]),
            text(&server["state"]),
            text(link.unwrap_or(&server["health"])),
            text(&server["weight"]),
            text(&server[address]),
            text(&server["ports"]),
            text(&counters["selected"]),
            text(&counters["plain"]),
            text(&counters["packets"]),
            text(&counters["packets_back"]),
        ]);
        for check in list(&server["checks"]).filter(|check| check["failure"].is_string()) {
            let _ = writeln!(
                failures,
                "{} {} {}: {} for {} s: {}",
                text(&server["name"]),
                text(&check["service"]),
                text(&check["address"]),
                text(&check["state"]),
                text(&check["seconds"]),
                text(&check["failure"])
            );
        }
    }
    let _ = write!(out, "{}\n{}", finished(&services), finished(&servers));
    if !failures.is_empty() {
        let _ = write!(out, "\n{failures}");
    }
    out
}

/// What the kernel forwards by itself, or why it does not.
fn offload(value: &Value) -> String {
    let Some(why_not) = value["why_not"].as_str() else {
        let mut out = format!("kernel offload: {} packets\n", text(&value["packets"]));
        if let Some(why) = value["plain"].as_str() {
            let _ = writeln!(out, "  not for plain clients: {why}");
        }
        if let Some(why) = value["routed"].as_str() {
            let _ = writeln!(out, "  routed: {why}");
        }
        for (service, why) in value["services"].as_object().into_iter().flatten() {
            let _ = writeln!(out, "  not for {service}: {}", text(why));
        }
        return out;
    };
    format!("kernel offload: none: {why_not}\n")
}

fn server(value: &Value) -> String {
    let about = format!(
        "server agent on {} for {}: divert {}\n\n",
        text(&value["interface"]),
        text(&value["addresses"]),
        text(&value["divert"])
    );
    about + &services(value)
}

/// An agent's services and connections.
pub(super) fn services(value: &Value) -> String {
    let mut services = table(
        &[
            "SERVICE",
            "REDIRECT PORT",
            "SERVICE PORT",
            "CONNECTIONS",
            "PLAIN",
            "NOBODY LISTENS AT",
            "DRAINED TO",
        ],
        &[1, 2, 3, 4],
    );
    for service in list(&value["services"]) {
        services.add_row([
            text(&service["name"]),
            text(&service["redirect_port"]),
            text(&service["service_port"]),
            text(&service["connections"]),
            text(&service["plain"]),
            text(&service["silent"]),
            text(&service["drained_to"]),
        ]);
    }
    finished(&services)
}

/// What the kernel exchanges ports of by itself, or why it does not.
fn swapped(value: &Value) -> String {
    match value["why_not"].as_str() {
        Some(why_not) => format!("kernel offload: none: {why_not}"),
        None => format!(
            "kernel offload: {} connections, {} packets",
            text(&value["connections"]),
            text(&value["packets"])
        ),
    }
}

fn client(value: &Value) -> String {
    let mut out = format!(
        "{} client: {} of at most {} connections\n{}\n\n",
        text(&value["mode"]),
        text(&value["connections"]),
        text(&value["most"]),
        swapped(&value["offload"]),
    );
    let mut vips = table(&["VIP", "INTERFACE", "GATEWAY", "PATH"], &[]);
    for vip in list(&value["vips"]) {
        vips.add_row([
            text(&vip["address"]),
            text(&vip["interface"]),
            text(&vip["gateway"]),
            text(&vip["path"]),
        ]);
    }
    out += &finished(&vips);
    if list(&value["flows"]).next().is_some() {
        let mut flows = table(&["LOCAL", "VIP", "SERVICE PORT"], &[2]);
        for flow in list(&value["flows"]) {
            flows.add_row([text(&flow["local"]), text(&flow["vip"]), text(&flow["service_port"])]);
        }
        let _ = write!(out, "\n{}", finished(&flows));
    }
    out
}

/// Counters other than 0, one a line with its way from the root.
pub(super) fn counters(value: &Value) -> String {
    fn rows(name: &str, value: &Value, table: &mut Table) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    let name = if name.is_empty() { key.clone() } else { format!("{name} {key}") };
                    rows(&name, value, table);
                }
            }
            Value::Number(number) if number.as_u64() != Some(0) => {
                table.add_row([name.to_owned(), number.to_string()]);
            }
            _ => {}
        }
    }
    let mut counters = table(&["COUNTER", "VALUE"], &[1]);
    rows("", value, &mut counters);
    finished(&counters)
}

/// How far a drain is.
pub(super) fn progress(value: &Value) -> String {
    let server = text(&value["server"]);
    if let Some(error) = value["agent_error"].as_str() {
        return format!("{server}: the agent does not answer ({error})");
    }
    if let Some(count) = value["connections"].as_u64() {
        return format!("{server}: {count} connections");
    }
    let (quiet, needed) = (text(&value["quiet_s"]), text(&value["quiet_needed_s"]));
    format!("{server}: no packet for {quiet} of {needed} s")
}

/// How far a move is, or what came of it.
pub(super) fn moves(value: &Value) -> String {
    let mut out = text(&value["service"]);
    let parts = [
        ("moved", "moved"),
        ("closed", "closed meanwhile"),
        ("timed_out", "not followed by their clients"),
        ("reset", "reset"),
        ("refused", "that could not be asked"),
        ("moving", "being asked"),
        ("waiting", "to be asked"),
        ("left", "left out by the limit"),
        ("plain", "of plain clients, which cannot be asked"),
    ];
    let told = |key: &str| value[key].as_u64().unwrap_or_default();
    for (index, (key, what)) in parts.iter().filter(|(key, _)| *key == "moved" || told(key) > 0).enumerate() {
        let _ = write!(out, "{} {} {what}", if index == 0 { ":" } else { "," }, told(key));
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_balancer_is_shown_as_two_tables_and_what_is_wrong() {
        let shown = show(&json!({
            "role": "balancer", "vips": ["203.0.113.10"], "forward": "network", "legacy": "hash", "default_server": null,
            "services": [{ "name": "web", "redirect_port": 443, "policy": "random", "check": { "kind": "tcp" },
                           "servers": 2, "taking": 1 }],
            "servers": [{ "name": "web-1", "state": "up", "health": "unhealthy", "weight": 1,
                          "addresses": ["10.0.0.11", "fd00::11"], "ports": { "web": 41001 },
                          "checks": [{ "service": "web", "address": "10.0.0.11:41001", "state": "unhealthy",
                                       "seconds": 3, "failure": "HTTP status 503" }],
                          "counters": { "selected": 5, "plain": 0, "packets": 70, "packets_back": 60 } }],
            "offload": { "in_force": false, "why_not": "a capture records every packet" },
        }));
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0], "balancer of 203.0.113.10: forward network, legacy hash, default server -");
        assert_eq!(lines[1], "kernel offload: none: a capture records every packet");
        assert_eq!(lines[3].split_whitespace().next(), Some("SERVICE"));
        let words: Vec<&str> = lines[7].split_whitespace().collect();
        let wanted =
            ["web-1", "up", "unhealthy", "1", "10.0.0.11", "fd00::11", "web=41001", "5", "0", "70", "60"];
        assert_eq!(words, wanted);
        assert_eq!(lines[9], "web-1 web 10.0.0.11:41001: unhealthy for 3 s: HTTP status 503");
    }

    #[test]
    fn a_move_is_told_in_a_sentence() {
        let told = moves(&json!({ "service": "web", "moved": 0, "closed": 2, "timed_out": 0, "moving": 3 }));
        assert_eq!(told, "web: 0 moved, 2 closed meanwhile, 3 being asked");
    }

    #[test]
    fn counters_that_are_0_are_left_out() {
        let shown = counters(&json!({ "a": { "b": 1, "c": 0 }, "d": 20 }));
        let lines: Vec<Vec<&str>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines, [vec!["COUNTER", "VALUE"], vec!["a", "b", "1"], vec!["d", "20"]]);
    }
}
