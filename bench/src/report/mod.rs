//! Results as others read them.

pub mod json;
pub mod table;
