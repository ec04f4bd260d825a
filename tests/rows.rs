//! `ROWS.md`, `CONFORMANCE.md` and `PEERS_BUGS.md` name tests and files that exist, and leave nothing out.

use std::collections::BTreeSet;
use std::path::Path;

/// A file of the project.
fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The cells of the rows of all tables under the heading that begins so.
fn rows<'a>(text: &'a str, heading: &str) -> Vec<Vec<&'a str>> {
    let mut wanted = false;
    let mut found = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.starts_with('#') {
            wanted = line.trim_start_matches('#').trim().starts_with(heading);
        } else if line.starts_with("|---") || line.starts_with("| ---") {
            let table = lines.by_ref().take_while(|line| line.starts_with("| "));
            let table = table.map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect());
            let table: Vec<Vec<&str>> = table.collect();
            if wanted {
                found.extend(table);
            }
        }
    }
    assert!(!found.is_empty(), "no rows under {heading:?}");
    found
}

/// The names in a cell.
fn names(cell: &str) -> impl Iterator<Item = &str> {
    cell.split(", ").map(|name| name.trim_matches('`'))
}

/// The tests of a source file: what follows an attribute that ends in `test]`.
fn tests_of(source: &str) -> BTreeSet<&str> {
    let mut tests = BTreeSet::new();
    let mut marked = false;
    for line in source.lines().map(str::trim) {
        if line.starts_with("#[") {
            marked |= line == "#[test]" || line.starts_with("#[tokio::test");
        } else if let Some((_, rest)) = line.split_once("fn ") {
            if let Some((name, _)) = rest.split_once('(').filter(|_| marked) {
                tests.insert(name);
            }
            marked = false;
        }
    }
    tests
}

/// Each test that the cell names is there.
fn check_tests(row: &str, cell: &str) {
    for test in names(cell) {
        let (file, name) = test.split_once("::").unwrap_or_else(|| panic!("{row}: {test:?} names no test"));
        assert!(tests_of(&read(file)).contains(name), "{row}: {file} has no test {name}");
    }
}

/// The first cells of tables of three columns, whose last ones name tests.
fn rows_with_tests(text: &str) -> BTreeSet<&str> {
    let mut known = BTreeSet::new();
    for cells in rows(text, "") {
        let [row, _, tests] = cells[..] else { panic!("not three cells: {cells:?}") };
        assert!(known.insert(row), "{row} stands twice");
        check_tests(row, tests);
    }
    known
}

#[test]
fn every_row_names_tests_that_exist() {
    let known = rows_with_tests(include_str!("ROWS.md"));
    assert!(known.len() > 20, "rows were not read: {known:?}");
}

#[test]
fn every_bug_of_peers_names_tests_that_exist() {
    let known = rows_with_tests(include_str!("PEERS_BUGS.md"));
    assert_eq!(known.len(), 12, "bugs were not read: {known:?}");
}

/// Whether the text speaks of the rule: `C1` is not in `C10`.
fn cites(text: &str, rule: &str) -> bool {
    text.match_indices(rule).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + rule.len()..].chars().next();
        !before.is_some_and(char::is_alphanumeric) && !after.is_some_and(char::is_alphanumeric)
    })
}

#[test]
fn every_rule_of_the_protocol_is_kept_somewhere_and_shown_by_a_test() {
    let protocol = read("stack/PROTOCOL.md");
    let marked = protocol.lines().filter_map(|line| line.strip_prefix("- **")?.split_once("**"));
    let numbered = |rule: &&str| rule.ends_with(|last: char| last.is_ascii_digit());
    let ruled: BTreeSet<&str> = marked.map(|(rule, _)| rule).filter(numbered).collect();
    let mut known = BTreeSet::new();
    for cells in rows(include_str!("CONFORMANCE.md"), "Rules of stack/PROTOCOL.md") {
        let [rule, code, tests] = cells[..] else { panic!("not three cells: {cells:?}") };
        assert!(known.insert(rule), "{rule} stands twice");
        if code == "-" {
            continue;
        }
        for file in names(code) {
            assert!(cites(&read(file), rule), "{file} does not speak of {rule}");
        }
        check_tests(rule, tests);
    }
    assert_eq!(known, ruled);
    assert!(ruled.len() > 50);
}

#[test]
fn every_must_of_the_standard_is_kept_or_said_not_to_be() {
    let text = include_str!("CONFORMANCE.md");
    let mut known = BTreeSet::new();
    let mut note = |requirement: &str| {
        for one in names(requirement) {
            let number: u8 = one.strip_prefix("MUST-").and_then(|number| number.parse().ok()).expect(one);
            assert!(known.insert(number), "{one} stands twice");
        }
    };
    for cells in rows(text, "RFC 9293: what the endpoint and") {
        let [requirement, _, tests] = cells[..] else { panic!("not three cells: {cells:?}") };
        note(requirement);
        check_tests(requirement, tests);
    }
    for cells in rows(text, "RFC 9293: what the endpoint does not keep") {
        let [requirement, _] = cells[..] else { panic!("not two cells: {cells:?}") };
        note(requirement);
    }
    assert!(known.into_iter().eq(1..=69), "RFC 9293 numbers its MUSTs from 1 to 69");
}
