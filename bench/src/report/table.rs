//! Tables for the terminal and for documents.

use comfy_table::{ContentArrangement, Table, presets};

use crate::contestant::Contestant;
use crate::figure::Figure;
use crate::results::Results;
use crate::statistics::Summary;

/// A row for each contestant, a column for each figure: `median (least-greatest)`, and of rates the part of the
/// [limit](Contestant::limit)'s.
pub fn figures(results: &Results, figures: &[Figure]) -> Table {
    let mut table = empty();
    let titles = figures.iter().map(|figure| figure.title().to_owned());
    table.set_header(std::iter::once(String::new()).chain(titles));
    for contestant in results.contestants() {
        let cells: Vec<Option<String>> =
            figures.iter().map(|figure| cell(results, contestant, *figure)).collect();
        if cells.iter().any(Option::is_some) {
            let cells = cells.into_iter().map(|cell| cell.unwrap_or_else(|| "-".to_owned()));
            table.add_row(std::iter::once(contestant.name().to_owned()).chain(cells));
        }
    }
    table
}

/// A row for each contestant that is a process, a column for each number of open connections.
pub fn memory(results: &Results) -> Table {
    let mut table = empty();
    let counts = results.memory_counts();
    let titles = counts.iter().map(|count| format!("{count} connections, KiB"));
    table.set_header(std::iter::once(String::new()).chain(titles));
    for contestant in results.contestants() {
        let cells: Vec<_> = counts.iter().map(|count| results.memory(contestant, *count)).collect();
        if cells.iter().any(Option::is_some) {
            let cells = cells
                .into_iter()
                .map(|cell| cell.map_or_else(|| "-".to_owned(), |kilobytes| kilobytes.to_string()));
            table.add_row(std::iter::once(contestant.name().to_owned()).chain(cells));
        }
    }
    table
}

fn empty() -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_content_arrangement(ContentArrangement::Disabled);
    table
}

fn cell(results: &Results, contestant: Contestant, figure: Figure) -> Option<String> {
    // What others are compared with adds nothing to itself; its own figure says more.
    let base = contestant == Contestant::Direct && figure.is_added();
    let summary =
        if base { results.absolute(contestant, figure) } else { results.summary(contestant, figure) };
    let text = spread(summary?, figure.digits());
    if base {
        return Some(format!("[{text}]"));
    }
    let ratio = contestant.limit().and_then(|limit| results.ratio(contestant, limit, figure));
    Some(match ratio {
        Some(ratio) => format!("{text} {:.2}x", ratio.median),
        None => text,
    })
}

fn spread(summary: Summary, digits: usize) -> String {
    let Summary { median, low, high } = summary;
    if low.total_cmp(&high).is_eq() {
        return format!("{median:.digits$}");
    }
    format!("{median:.digits$} ({low:.digits$}..{high:.digits$})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::example;

    #[test]
    fn a_cell_has_median_ends_and_the_part_of_the_kernels() {
        let text = figures(&example(), &[Figure::Throughput, Figure::AddedP99]).to_string();
        let row = |name: &str| {
            text.lines().find(|line| line.starts_with(&format!("| {name} "))).unwrap().to_owned()
        };
        assert!(row("nft").contains("9.00 (8.00..10.00) 0.65x"), "{text}");
        assert!(row("kernel").contains("15.00 (10.00..20.00) "), "{text}");
        assert!(row("kernel").contains("40.0 (30.0..50.0)"), "{text}");
        assert!(row("direct").contains("[21.0 (20.0..22.0)]"), "{text}");
        assert!(!text.contains("haproxy"), "only memory was measured of it: {text}");
    }

    #[test]
    fn memory_is_told_of_processes() {
        let text = memory(&example()).to_string();
        assert!(
            text.lines()
                .any(|line| line.contains("haproxy") && line.contains("| -") && line.contains("90000"))
        );
        assert!(!text.contains("kernel"), "{text}");
    }
}
