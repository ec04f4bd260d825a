//! Tests of the whole against the kernel, each in a network namespace of its own.

mod divert;
mod host;
mod offload;
mod query;
mod shortcuts;
mod swaps;
