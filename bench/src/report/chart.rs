//! A picture of the figures.

use svg::Document;
use svg::node::element::{Group, Line, Rectangle, Text, Title};

use crate::contestant::Contestant;
use crate::figure::Figure;
use crate::results::Results;
use crate::statistics::Summary;

/// Widths and heights, in pixels.
const NAMES: f64 = 120.0;
const BARS: f64 = 300.0;
const VALUES: f64 = 90.0;
const ROW: f64 = 18.0;
const BAR: f64 = 12.0;
const HEAD: f64 = 42.0;
const MARGIN: f64 = 12.0;
const COLUMNS: usize = 2;

const SUBJECT: &str = "#2a6f97";
const PEER: &str = "#a9a9a9";
const INK: &str = "#222222";

/// A panel for each figure: a bar as long as the median for each contestant, a thin line from the least to the greatest.
/// What is less than nothing has no bar.
pub fn draw(results: &Results) -> String {
    let panels: Vec<Panel> =
        results.figures().into_iter().filter_map(|figure| Panel::of(results, figure)).collect();
    let width = NAMES + BARS + VALUES + 2.0 * MARGIN;
    let mut heights = [MARGIN; COLUMNS];
    let mut placed = Vec::new();
    for panel in &panels {
        // Into the column that is shorter so far.
        let column = usize::from(heights[1] < heights[0]);
        let left = if column == 0 { MARGIN } else { width + MARGIN };
        placed.push(panel.draw(left, heights[column]));
        heights[column] += panel.height();
    }
    let (width, height) = (2.0 * width, heights[0].max(heights[1]) + MARGIN);
    let paper = Rectangle::new().set("width", width).set("height", height).set("fill", "white");
    let mut document = Document::new()
        .set("viewBox", (0.0, 0.0, width, height))
        .set("width", width)
        .set("height", height)
        .set("font-family", "sans-serif")
        .set("font-size", 11)
        .add(paper);
    for group in placed {
        document = document.add(group);
    }
    document.to_string()
}

struct Panel {
    figure: Figure,
    rows: Vec<(Contestant, Summary)>,
}

impl Panel {
    fn of(results: &Results, figure: Figure) -> Option<Panel> {
        let rows: Vec<_> = results
            .contestants()
            .into_iter()
            .filter(|contestant| !(figure.is_added() && *contestant == Contestant::Direct))
            .filter_map(|contestant| Some((contestant, results.summary(contestant, figure)?)))
            .collect();
        (!rows.is_empty()).then_some(Panel { figure, rows })
    }

    fn height(&self) -> f64 {
        HEAD + self.rows.iter().map(|_| ROW).sum::<f64>()
    }

    fn draw(&self, left: f64, top: f64) -> Group {
        let highest = self.rows.iter().map(|(_, summary)| summary.high).fold(f64::MIN_POSITIVE, f64::max);
        let title =
            Text::new(self.figure.title()).set("x", left).set("y", top + 20.0).set("font-weight", "bold");
        let mut group = Group::new().set("fill", INK).add(title);
        let mut y = top + HEAD;
        for (contestant, summary) in &self.rows {
            group = group.add(self.row(*contestant, *summary, highest, (left, y)));
            y += ROW;
        }
        group
    }

    fn row(&self, contestant: Contestant, summary: Summary, highest: f64, (left, y): (f64, f64)) -> Group {
        let zero = left + NAMES;
        let length = |value: f64| (value / highest).clamp(0.0, 1.0) * BARS;
        let color = if contestant.is_shunt() { SUBJECT } else { PEER };
        let bar = Rectangle::new()
            .set("x", zero)
            .set("y", y - BAR)
            .set("width", length(summary.median))
            .set("height", BAR)
            .set("fill", color);
        let middle = y - BAR / 2.0;
        let range = Line::new()
            .set("x1", zero + length(summary.low))
            .set("x2", zero + length(summary.high))
            .set("y1", middle)
            .set("y2", middle)
            .set("stroke", INK);
        let digits = self.figure.digits();
        let name =
            Text::new(contestant.name()).set("x", zero - 6.0).set("y", y - 2.0).set("text-anchor", "end");
        let value = format!("{:.digits$}", summary.median);
        let value = Text::new(value).set("x", zero + BARS + 6.0).set("y", y - 2.0);
        let about = Title::new(contestant.about());
        Group::new().add(about).add(bar).add(range).add(name).add(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::example;

    /// The attribute of the bars of one panel.
    fn widths(picture: &str) -> Vec<f64> {
        let bars = picture.split("<rect").skip(2);
        bars.filter_map(|bar| bar.split_once("width=\"")?.1.split('"').next()?.parse().ok()).collect()
    }

    #[test]
    fn bars_are_as_long_as_medians() {
        let mut results = Results::default();
        results.add(Contestant::Kernel, Figure::Throughput, 20.0);
        results.add(Contestant::Shunt, Figure::Throughput, 5.0);
        let picture = draw(&results);
        assert_eq!(widths(&picture), [BARS, BARS / 4.0]);
        assert!(picture.contains(SUBJECT) && picture.contains(PEER));
        assert!(picture.contains(">\n5.00\n<") || picture.contains(">5.00<"), "{picture}");
    }

    #[test]
    fn what_is_less_than_nothing_has_no_bar() {
        let mut results = Results::default();
        results.add(Contestant::Direct, Figure::AddedP99, 20.0);
        results.add(Contestant::Kernel, Figure::AddedP99, 10.0);
        let picture = draw(&results);
        assert_eq!(widths(&picture), [0.0]);
        assert!(picture.contains("-10.0"), "{picture}");
    }

    #[test]
    fn there_is_a_panel_for_each_figure() {
        let picture = draw(&example());
        for figure in example().figures() {
            assert!(picture.contains(figure.title()), "{figure:?}");
        }
        assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
    }
}
