//! What is measured of one contestant, each in bounded time.

pub mod cpu;
pub mod iperf;
pub mod latency;
pub mod memory;
pub mod wrk;

use std::time::Duration;

use anyhow::Result;

use crate::figure::Figure;
use crate::world::World;

/// One run that gives some figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Measure {
    /// iperf3, one stream to the server
    Stream,
    /// iperf3, eight streams to the server, and the processors' time for them
    Streams,
    /// iperf3, eight streams from the server
    Download,
    /// Messages of 64 bytes there and back over 32 connections at once
    Messages,
    /// wrk over 64 connections that stay open
    Requests,
    /// wrk with a connection a request, and the processors' time for them
    Connections,
    /// Messages of 64 bytes there and back, one at a time
    Latency,
}

/// How many connections send messages at once.
const MESSAGE_CONNECTIONS: usize = 32;

impl Measure {
    /// Those of which one line of JSON tells.
    pub const QUICK: [Measure; 3] = [Measure::Streams, Measure::Connections, Measure::Latency];

    /// As in options and errors.
    pub fn name(self) -> String {
        use clap::ValueEnum as _;
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Measures for `time`.
    ///
    /// # Errors
    /// The program that measures fails, or a connection breaks.
    pub fn run(self, world: &World, time: Duration) -> Result<Vec<(Figure, f64)>> {
        match self {
            Measure::Stream => {
                let moved = iperf::run(world, time, 1, false)?;
                Ok(vec![(Figure::Throughput1, moved.gigabits_per_second)])
            }
            Measure::Streams => {
                let before = cpu::Busy::now()?;
                let moved = iperf::run(world, time, 8, false)?;
                let busy = before.elapsed()?;
                Ok(vec![
                    (Figure::Throughput, moved.gigabits_per_second),
                    (Figure::CpuPerGigabyte, busy / moved.gigabytes),
                ])
            }
            Measure::Download => {
                let moved = iperf::run(world, time, 8, true)?;
                Ok(vec![(Figure::Download, moved.gigabits_per_second)])
            }
            Measure::Messages => {
                let rate = latency::messages(world, time, MESSAGE_CONNECTIONS)?;
                Ok(vec![(Figure::Messages, rate)])
            }
            Measure::Requests => Ok(vec![(Figure::Requests, wrk::run(world, time, true)?.per_second)]),
            Measure::Connections => {
                let before = cpu::Busy::now()?;
                let done = wrk::run(world, time, false)?;
                let busy = before.elapsed()?;
                Ok(vec![
                    (Figure::Connections, done.per_second),
                    (Figure::CpuPerConnection, busy / done.requests * 1e6),
                ])
            }
            Measure::Latency => {
                let histogram = latency::ping_pong(world, time)?;
                let micros = |quantile| {
                    Duration::from_nanos(histogram.value_at_quantile(quantile)).as_secs_f64() * 1e6
                };
                Ok(vec![
                    (Figure::AddedP50, micros(0.5)),
                    (Figure::AddedP99, micros(0.99)),
                    (Figure::AddedP999, micros(0.999)),
                ])
            }
        }
    }
}
