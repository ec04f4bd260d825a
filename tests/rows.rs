//! `ROWS.md` names tests that exist.

use std::collections::BTreeSet;
use std::path::Path;

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

#[test]
fn every_row_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rows = include_str!("ROWS.md");
    let mut known = BTreeSet::new();
    for line in rows.lines().filter(|line| line.starts_with("| ")).skip(1) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [row, _, tests] = cells[..] else { panic!("not three cells: {line}") };
        assert!(known.insert(row), "{row} stands twice");
        let named: Vec<&str> = tests.split(", ").map(|test| test.trim_matches('`')).collect();
        assert!(!named.is_empty());
        for test in named {
            let (file, name) =
                test.split_once("::").unwrap_or_else(|| panic!("{row}: {test:?} names no test"));
            let source = std::fs::read_to_string(root.join(file))
                .unwrap_or_else(|error| panic!("{row}: {file}: {error}"));
            assert!(tests_of(&source).contains(name), "{row}: {file} has no test {name}");
        }
    }
    assert!(known.len() > 20, "rows were not read: {known:?}");
}
