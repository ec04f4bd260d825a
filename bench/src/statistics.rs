//! Several measurements of one figure.

use serde::Serialize;

/// The middle and the ends of some measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub low: f64,
    /// The greatest.
    pub high: f64,
}

impl Summary {
    /// Of some values; `None` without any. What is no number is left out.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Summary> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (low, high) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Summary { median, low, high })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(Summary::of([3.0, 1.0, 2.0]), Some(Summary { median: 2.0, low: 1.0, high: 3.0 }));
        assert_eq!(Summary::of([4.0]), Some(Summary { median: 4.0, low: 4.0, high: 4.0 }));
    }

    #[test]
    fn of_an_even_number_it_is_between_the_two_in_the_middle() {
        let summary = Summary::of([10.0, 1.0, 2.0, 4.0]);
        assert_eq!(summary, Some(Summary { median: 3.0, low: 1.0, high: 10.0 }));
    }

    #[test]
    fn nothing_and_what_is_no_number_have_none() {
        assert_eq!(Summary::of([]), None);
        assert_eq!(Summary::of([f64::NAN]), None);
        let summary = Summary::of([f64::NAN, -2.0, f64::INFINITY]);
        assert_eq!(summary, Some(Summary { median: -2.0, low: -2.0, high: -2.0 }));
    }
}
