//! Ladder diagrams as a picture.

use svg::Document;
use svg::node::element::{Definitions, Line, Marker, Path, Rectangle, Style, Text};

use crate::ladder::{Arrow, Conversation, Ladder};

const LINE: usize = 22;
const LEFT: usize = 110;
const COLUMN: usize = 260;
const NOTES: usize = 420;
const MARGIN: usize = 20;
const STYLE: &str = "text { font: 12px monospace; fill: #222 } .title { font-weight: bold; font-size: 14px } \
    .note { fill: #666; font-size: 11px } line { stroke: #222 } .lane { stroke: #bbb } .wrong { fill: #b00 }";

impl Ladder {
    /// The diagrams as one SVG picture.
    pub fn svg(&self) -> String {
        let columns = self.conversations().iter().map(|it| it.ports.len()).max().unwrap_or(1);
        let width = LEFT + columns * COLUMN + NOTES;
        let mut picture = Document::new().add(Style::new(STYLE)).add(arrow_head());
        picture =
            picture.add(Rectangle::new().set("width", "100%").set("height", "100%").set("fill", "white"));
        let mut y = MARGIN;
        for conversation in self.conversations() {
            (picture, y) = draw(picture, conversation, y);
        }
        let left_out = self.left_out();
        if !left_out.is_empty() {
            picture = picture.add(text(&left_out, MARGIN, y + LINE, "note"));
            y += LINE;
        }
        let height = y + MARGIN;
        picture.set("viewBox", (0, 0, width, height)).set("width", width).set("height", height).to_string()
    }
}

fn arrow_head() -> Definitions {
    let tip = Path::new().set("d", "M0,0 L8,4 L0,8 z").set("fill", "#222");
    let marker = Marker::new().set("id", "tip").set("orient", "auto");
    let marker = marker.set("markerWidth", 8).set("markerHeight", 8).set("refX", 8).set("refY", 4);
    Definitions::new().add(marker.add(tip))
}

fn text(content: &str, x: usize, y: usize, class: &str) -> Text {
    Text::new(content).set("x", x).set("y", y).set("class", class)
}

fn draw(picture: Document, conversation: &Conversation, top: usize) -> (Document, usize) {
    let mut picture = picture.add(text(&conversation.title(), MARGIN, top + LINE, "title"));
    let headers = conversation.headers();
    let first = top + 3 * LINE;
    let rest = conversation.rest();
    let bottom = first + (conversation.arrows.len() + usize::from(rest.is_some())) * LINE;
    for (index, header) in headers.iter().enumerate() {
        let x = LEFT + index * COLUMN;
        picture = picture.add(text(header, x, top + 2 * LINE, "").set("text-anchor", "middle"));
        let lane = Line::new().set("x1", x).set("x2", x).set("y1", top + 2 * LINE + 6).set("y2", bottom);
        picture = picture.add(lane.set("class", "lane"));
    }
    let notes = LEFT + conversation.ports.len() * COLUMN + 12;
    let mut y = first;
    for arrow in &conversation.arrows {
        picture = draw_arrow(picture, arrow, y, notes);
        y += LINE;
    }
    if let Some(rest) = rest {
        picture = picture.add(text(&rest, LEFT + 8, y, "note"));
    }
    (picture, bottom + LINE)
}

fn draw_arrow(picture: Document, arrow: &Arrow, y: usize, notes: usize) -> Document {
    if arrow.skipped > 0 {
        return picture.add(text(&format!("{} more", arrow.skipped), LEFT + 8, y, "note"));
    }
    let time = format!("{:.6}", arrow.at.as_secs_f64());
    let far = LEFT + arrow.column * COLUMN;
    let (from, to) = if arrow.up { (LEFT, far) } else { (far, LEFT) };
    let line = Line::new().set("x1", from).set("x2", to).set("y1", y).set("y2", y);
    let class = if arrow.note.contains("! ") { "note wrong" } else { "note" };
    let picture = picture
        .add(text(&time, MARGIN, y + 4, "note"))
        .add(line.set("marker-end", "url(#tip)"))
        .add(text(&arrow.label, LEFT + 10, y - 4, ""));
    if arrow.note.is_empty() { picture } else { picture.add(text(&arrow.note, notes, y + 4, class)) }
}
