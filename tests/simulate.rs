//! `shunt simulate`: what it prints is what scripts and people read; the model has its own tests in `sim/`.

use std::process::{Command, Output};

use serde_json::Value;

const SCENARIOS: [&str; 10] = [
    "rolling-restart",
    "scale-out",
    "scale-in",
    "replace",
    "churn",
    "balancer-change",
    "syn-flood",
    "reweight",
    "server-death",
    "forced-removal",
];
const CONTENDERS: [&str; 7] = ["redirect", "plain", "maglev", "maglev_lru", "two_slot", "jet", "modulo"];

fn simulate(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shunt"));
    command.args(["simulate", "--connections", "50000", "--servers", "20"]).args(arguments);
    command.output().expect("it runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn good(arguments: &[&str]) -> String {
    let output = simulate(arguments);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout)
}

fn json(arguments: &[&str]) -> Value {
    let out = good(&[&["--json"], arguments].concat());
    serde_json::from_str(out.lines().last().expect("a last line")).expect("one object")
}

#[test]
fn the_last_line_of_json_has_every_scenario_and_contender() {
    let summary = json(&[]);
    let scenarios = summary["scenarios"].as_array().expect("an array");
    let names: Vec<_> = scenarios.iter().filter_map(|scenario| scenario["name"].as_str()).collect();
    assert_eq!(names, SCENARIOS);
    for scenario in scenarios {
        assert_eq!(scenario["connections"], 50_000);
        for contender in CONTENDERS {
            assert!(scenario["broken"][contender].is_u64(), "{contender}: {scenario}");
        }
        let ends = ["server-death", "forced-removal"].contains(&scenario["name"].as_str().expect("a name"));
        assert_eq!(scenario["broken"]["redirect"].as_u64() > Some(0), ends, "{scenario}");
        assert_eq!(scenario["broken"]["redirect"], scenario["lost"]["redirect"], "{scenario}");
        assert!(scenario["broken"]["modulo"].as_u64() > Some(0), "{scenario}");
    }
}

#[test]
fn the_same_seed_prints_the_same() {
    let churn = |seed| good(&["--json", "--scenario", "churn", "--seed", seed]);
    assert_eq!(churn("7"), churn("7"));
    assert_ne!(churn("7"), churn("8"));
}

#[test]
fn options_reach_the_model() {
    let broken = |arguments: &[&str], contender: &str| {
        let summary = json(&[&["--scenario", "replace"], arguments].concat());
        summary["scenarios"][0]["broken"][contender].as_u64().expect("a number")
    };
    assert_eq!(broken(&["--plain", "0"], "plain"), 0);
    assert!(broken(&["--plain", "50"], "plain") > broken(&["--plain", "5"], "plain"));
    assert_eq!(broken(&["--table-size", "100000"], "maglev_lru"), 0);
    assert!(broken(&["--table-size", "10"], "maglev_lru") > 0);
    let all = json(&["--plain", "100", "--scenario", "scale-out", "--scenario", "reweight"]);
    assert_eq!(all["scenarios"].as_array().map(Vec::len), Some(2));
    assert_eq!(
        (&all["scenarios"][0]["redirected"], &all["plain_percent"]),
        (&Value::from(0), &Value::from(100))
    );
}

#[test]
fn people_get_a_table_a_picture_and_what_breaks_ours() {
    let folder = tempfile::tempdir().expect("a folder");
    let (csv, svg) = (folder.path().join("flows.csv"), folder.path().join("flows.svg"));
    let paths = [&csv, &svg].map(|path| path.to_str().expect("UTF-8"));
    let wanted =
        ["--scenario", "server-death", "--scenario", "scale-out", "--csv", paths[0], "--svg", paths[1]];
    let out = good(&wanted);
    let row = out.lines().find(|line| line.trim_start().starts_with("scale-out")).expect("a row");
    assert_eq!(row.split_whitespace().nth(1), Some("0"), "redirect: {row}");
    assert!(out.contains("plain clients move") && out.contains("redirected connections ended with"), "{out}");
    let csv = std::fs::read_to_string(csv).expect("a file");
    assert_eq!(csv.lines().count(), 1 + 2 * CONTENDERS.len(), "{csv}");
    assert!(csv.lines().nth(1).is_some_and(|line| line.starts_with("scale-out,redirect,")), "{csv}");
    let svg = std::fs::read_to_string(svg).expect("a file");
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
}

#[test]
fn help_lists_the_options_and_mistakes_are_refused() {
    let help = good(&["--help"]);
    let options =
        ["--connections", "--seed", "--servers", "--balancers", "--plain", "--scenario", "--table-size"];
    for word in options.iter().chain(&["--csv", "--svg", "--json"]).chain(&SCENARIOS) {
        assert!(help.contains(word), "{word}: {help}");
    }
    for wrong in [["--scenario", "earthquake"], ["--plain", "101"], ["--servers", "9"], ["--table-size", "0"]]
    {
        let output = simulate(&wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {}", text(&output.stderr));
    }
    let output = simulate(&["--scenario", "churn", "--csv", "/nowhere/flows.csv"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("/nowhere/flows.csv"), "{}", text(&output.stderr));
}
