//! The results as text and as JSON.

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::{Map, Value, json};

use super::{Figure, Results, Setting};
use crate::report::json::rounded;

/// A table: medians, and in brackets the least and the greatest.
pub fn markdown(results: &Results) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(std::iter::once("").chain(Figure::all().map(|figure| figure.title)));
    for setting in Setting::ALL {
        let title = match setting {
            Setting::Offload => "super-packets".to_owned(),
            Setting::Beside => format!("super-packets, {} connections open", results.idle),
            Setting::Segments => "no super-packets".to_owned(),
        };
        let cells = Figure::all().map(|figure| {
            let digits = figure.digits;
            let summary = results.summary(setting, figure);
            summary.map_or_else(String::new, |of| {
                format!("{:.digits$} ({:.digits$}-{:.digits$})", of.median, of.low, of.high)
            })
        });
        table.add_row(std::iter::once(title).chain(cells));
    }
    let memory = results.memory_per_connection().unwrap_or(f64::NAN);
    format!("{table}\n\nMemory of an open connection: {memory:.0} bytes.")
}

/// The medians by figure and setting.
pub fn json(results: &Results) -> Value {
    let mut object = Map::new();
    for figure in Figure::all() {
        let of = |setting: Setting| {
            let median = results.summary(setting, figure)?.median;
            Some((setting.key().to_owned(), json!(rounded(median, figure.digits))))
        };
        let medians: Map<String, Value> = Setting::ALL.into_iter().filter_map(of).collect();
        object.insert(figure.key.to_owned(), medians.into());
    }
    object.insert("open_connections".to_owned(), json!(results.idle));
    let memory = results.memory_per_connection().map(|bytes| rounded(bytes, 0));
    object.insert("bytes_per_connection".to_owned(), json!(memory));
    object.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::Measure;

    #[test]
    fn medians_are_told_by_figure_and_setting() {
        let [send, _] = Measure::Send.figures();
        let values = [1.0, 3.0, 2.0].map(|value| (Setting::Offload, send, value)).into();
        let results = Results { values, idle: 1000, memory: Some((4096, 3_004_096)) };
        let told = json(&results);
        assert_eq!(told["send_gbps"]["offload"], 2.0);
        assert_eq!(told["bytes_per_connection"], 3000.0);
        assert!(told["send_gbps"].get("no_offload").is_none());
        assert!(markdown(&results).contains("2.00 (1.00-3.00)"));
        assert!(markdown(&results).contains("3000 bytes"));
    }
}
