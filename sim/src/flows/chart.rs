//! The shares of broken connections as a picture.

use svg::Document;
use svg::node::element::{Group, Line, Rectangle, Style, Text};

use super::report::{Contender, Report, Summary, percent};

const WIDTH: usize = 980;
const MARGIN: usize = 24;
const NAMES: usize = 160;
const VALUES: usize = 190;
const BARS: usize = WIDTH - 2 * MARGIN - NAMES - VALUES;
const ROW: usize = 18;
const TOP: usize = 96;
const STYLE: &str = "text { font: 13px sans-serif; fill: #222 } .title { font-weight: bold; font-size: 17px } \
    .scenario { font-weight: bold } .small { fill: #666; font-size: 11px } line { stroke: #ddd }";
/// The axis: powers of ten up to 100 %.
const DECADES: [&str; 7] = ["0.0001 %", "0.001 %", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"];
const LOWEST: f64 = 1e-6;

fn color(contender: Contender) -> &'static str {
    match contender {
        Contender::Redirect => "#1b7837",
        Contender::Plain => "#7fbf7b",
        Contender::Maglev => "#4575b4",
        Contender::MaglevLru => "#91bfdb",
        Contender::TwoSlot => "#fdae61",
        Contender::Jet => "#c2a5cf",
        Contender::Modulo => "#999999",
    }
}

fn text(content: &str, x: usize, y: usize, class: &str) -> Text {
    Text::new(content).set("x", x).set("y", y).set("class", class)
}

/// A scenario's part of the picture.
const PART: usize = ROW * (Contender::ALL.len() + 3);

/// How far a bar reaches; all that is not 0 is seen.
fn length(share: f64) -> f64 {
    if share <= 0.0 {
        return 0.0;
    }
    ((share / LOWEST).log10() / (DECADES.len() - 1) as f64).clamp(0.005, 1.0) * BARS as f64
}

impl Summary {
    /// The shares of broken connections as one SVG picture: bars by scenario, on a logarithmic axis.
    pub fn svg(&self) -> String {
        let height = TOP + self.scenarios.len() * PART + MARGIN;
        let about = format!(
            "{} connections in each scenario, {} servers, {} balancers, {} % plain clients, seed {}; shares of a \
             contestant's own connections, on a logarithmic axis",
            self.scenarios.first().map_or(0, |report| report.connections),
            self.servers,
            self.balancers,
            self.plain_percent,
            self.seed
        );
        let background = Rectangle::new().set("width", "100%").set("height", "100%").set("fill", "white");
        let mut picture = Document::new()
            .set("viewBox", (0, 0, WIDTH, height))
            .set("width", WIDTH)
            .set("height", height)
            .add(Style::new(STYLE))
            .add(background)
            .add(text("Broken connections", MARGIN, MARGIN + 12, "title"))
            .add(text(&about, MARGIN, MARGIN + 32, "small"))
            .add(axis(height));
        for (index, report) in self.scenarios.iter().enumerate() {
            picture = picture.add(bars(report, TOP + index * PART));
        }
        picture.to_string()
    }
}

fn axis(height: usize) -> Group {
    DECADES.iter().enumerate().fold(Group::new(), |axis, (decade, label)| {
        let x = MARGIN + NAMES + BARS * decade / (DECADES.len() - 1);
        let line = Line::new().set("x1", x).set("x2", x).set("y1", TOP - 14).set("y2", height - MARGIN);
        axis.add(line).add(text(label, x, TOP - 20, "small").set("text-anchor", "middle"))
    })
}

fn bars(report: &Report, top: usize) -> Group {
    let group = Group::new().add(text(report.name, MARGIN, top + ROW - 4, "scenario")).add(text(
        report.about,
        MARGIN,
        top + 2 * ROW - 5,
        "small",
    ));
    (2..).zip(Contender::ALL).fold(group, |group, (row, contender)| {
        let y = top + row * ROW;
        let (share, broken) = (report.share(contender), report.broken.get(contender));
        let bar = Rectangle::new()
            .set("x", MARGIN + NAMES)
            .set("y", y + 2)
            .set("width", format!("{:.1}", length(share)))
            .set("height", ROW - 4)
            .set("fill", color(contender));
        let value = match (report.connections_of(contender), broken) {
            (0, _) => "none of these".to_owned(),
            (_, 0) => "0".to_owned(),
            _ => format!("{broken} ({})", percent(share)),
        };
        let after = MARGIN + NAMES + length(share) as usize + 6;
        group.add(text(contender.title(), MARGIN + 16, y + ROW - 5, "")).add(bar).add(text(
            &value,
            after,
            y + ROW - 5,
            "",
        ))
    })
}
