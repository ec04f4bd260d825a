//! Results as others read them.

pub mod chart;
pub mod json;
pub mod markdown;
mod table;
