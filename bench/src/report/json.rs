//! One object on one line.

use serde_json::{Map, Value, json};

use crate::contestant::Contestant;
use crate::figure::Figure;
use crate::results::Results;

/// The medians of all figures by contestant, and the memory of the balancer under test by open connections.
pub fn object(results: &Results) -> Value {
    let mut object = Map::new();
    for figure in results.figures() {
        object.insert(figure.key().to_owned(), medians(results, figure));
    }
    let subject = [Contestant::Shunt, Contestant::ShuntTun]
        .into_iter()
        .find(|one| results.memory_counts().iter().any(|count| results.memory(*one, *count).is_some()));
    if let Some(subject) = subject {
        let counts = results.memory_counts().into_iter();
        let memory: Map<String, Value> = counts
            .filter_map(|count| Some((count.to_string(), results.memory(subject, count)?.into())))
            .collect();
        object.insert("balancer_rss_kb".to_owned(), memory.into());
    }
    let left_out =
        results.left_out.iter().map(|(contestant, why)| (contestant.name().to_owned(), json!(why)));
    object.insert("left_out".to_owned(), left_out.collect::<Map<_, _>>().into());
    object.insert("failures".to_owned(), json!(results.failures));
    object.into()
}

fn medians(results: &Results, figure: Figure) -> Value {
    let contestants = results.contestants().into_iter();
    let medians: Map<String, Value> = contestants
        .filter(|contestant| !(figure.is_added() && *contestant == Contestant::Direct))
        .filter_map(|contestant| {
            let median = results.summary(contestant, figure)?.median;
            Some((contestant.name().to_owned(), json!(rounded(median, figure.digits()))))
        })
        .collect();
    medians.into()
}

/// To as many digits as are shown elsewhere.
pub fn rounded(value: f64, digits: usize) -> f64 {
    format!("{value:.digits$}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::example;

    #[test]
    fn there_is_a_median_of_each_contestant() {
        let expected = json!({
            "throughput_gbps": { "kernel": 15.0, "nft": 9.0 },
            "connections_per_s": { "nft": 1234.0 },
            "p99_added_us": { "kernel": 40.0 },
            "balancer_rss_kb": { "0": 7000, "10000": 7100 },
            "left_out": { "nginx": "nginx <has> no module stream" },
            "failures": [],
        });
        assert_eq!(object(&example()), expected);
        assert!(!object(&example()).to_string().contains('\n'));
    }
}
