//! The demo's client: many short connections at a steady pace, and some that live across what happens meanwhile.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::client::{Exchange, Kind};
use super::message::{Broken, LoadReport, Message, Progress};
use super::pattern::mix;
use super::plan::share;

/// Connections open at once, at most: below the usual limit of open files.
const AT_ONCE: usize = 800;
const TELL: Duration = Duration::from_millis(100);
const LOOK: Duration = Duration::from_millis(20);

/// Arguments of `shunt demo-client`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ClientArgs {
    /// Where to connect.
    #[arg(long)]
    target: SocketAddr,

    /// Connections to make.
    #[arg(long)]
    connections: u64,

    /// How many of them live long.
    #[arg(long, default_value_t = 0)]
    long: u64,

    /// Short connections to begin in a second.
    #[arg(long)]
    rate: u32,
}

/// `shunt demo-client`: makes its connections and tells of them on standard output, as [`Message`]s.
///
/// # Errors
/// There is no event loop, or nobody reads.
pub(crate) fn load(arguments: &ClientArgs) -> anyhow::Result<ExitCode> {
    shunt_lab::die_with_parent()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(async {
        let state = Arc::new(State::default());
        let work = run(arguments, Arc::clone(&state));
        tokio::pin!(work);
        let mut ticks = interval(TELL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                report = &mut work => return anyhow::Ok(report),
                _ = ticks.tick() => tell(&Message::Progress(state.progress()))?,
            }
        }
    })?;
    tell(&Message::Report(report))?;
    Ok(ExitCode::SUCCESS)
}

fn tell(message: &Message) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(message)?)?;
    Ok(out.flush()?)
}

#[derive(Debug, Default)]
struct State {
    begun: AtomicU64,
    ended: AtomicU64,
    broken: AtomicU64,
    /// Short connections begun: what the parts are parts of.
    short: AtomicU64,
}

impl State {
    fn progress(&self) -> Progress {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Progress { begun: read(&self.begun), ended: read(&self.ended), broken: read(&self.broken) }
    }
}

async fn run(arguments: &ClientArgs, state: Arc<State>) -> LoadReport {
    let long = arguments.long.min(arguments.connections);
    let short = arguments.connections - long;
    let mut tasks = JoinSet::new();
    for index in 0..long {
        let (from, kind) = long_life(index, long);
        tasks.spawn(connection(arguments.target, index, from, kind, short, Arc::clone(&state), None));
    }
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    let begin = Instant::now();
    let mut report = LoadReport::default();
    for index in 0..short {
        let due = Duration::from_secs(1).mul_f64(share(index, arguments.rate.into()));
        sleep_until(begin + due).await;
        let slot = Arc::clone(&slots).acquire_owned().await.ok();
        state.short.fetch_add(1, Ordering::Relaxed);
        let state = Arc::clone(&state);
        tasks.spawn(connection(arguments.target, long + index, 0.0, Kind::Short, short, state, slot));
        while let Some(Ok(ended)) = tasks.try_join_next() {
            enter(&mut report, ended);
        }
    }
    while let Some(ended) = tasks.join_next().await {
        if let Ok(ended) = ended {
            enter(&mut report, ended);
        }
    }
    report
}

/// When a long connection begins and what it does: half live from the first third to the third quarter at most, so
/// that all of a drained server's end before the work does; half from the middle to the end.
fn long_life(index: u64, long: u64) -> (f64, Kind) {
    let place = share(index, long);
    let (from, until) =
        if place < 0.5 { (place * 0.7, place * 0.7 + 0.4) } else { (0.4 + (place - 0.5) * 0.4, 1.0) };
    (from, if index.is_multiple_of(2) { Kind::Kept { until } } else { Kind::Slow { until } })
}

type Ended = (Exchange, Option<String>);

async fn connection(
    target: SocketAddr,
    index: u64,
    from: f64,
    kind: Kind,
    short: u64,
    state: Arc<State>,
    slot: Option<tokio::sync::OwnedSemaphorePermit>,
) -> Ended {
    let part = || share(state.short.load(Ordering::Relaxed), short);
    while part() < from {
        tokio::time::sleep(LOOK).await;
    }
    state.begun.fetch_add(1, Ordering::Relaxed);
    let mut exchange = Exchange::new(mix(index));
    let result = exchange.run(target, kind, part).await;
    drop(slot);
    state.ended.fetch_add(1, Ordering::Relaxed);
    if result.is_err() {
        state.broken.fetch_add(1, Ordering::Relaxed);
    }
    (exchange, result.err().map(|fault| explain(&fault)))
}

/// An error with its causes: hyper's own text hides them.
fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

fn enter(report: &mut LoadReport, (exchange, fault): Ended) {
    let Exchange { local, origin, bytes, .. } = exchange;
    let complete = match (fault, origin) {
        (None, Some(origin)) => origin,
        (fault, origin) => {
            let reason = fault.unwrap_or_default();
            report.broken.push(Broken { local, origin, bytes, reason });
            return;
        }
    };
    let server = report.complete.entry(complete.server).or_default();
    let counter =
        if complete.port == super::plan::SHARED_PORT { &mut server.plain } else { &mut server.redirected };
    *counter += 1;
    server.bytes += bytes;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_connections_that_begin_before_the_drain_end_in_time_for_the_removal() {
        for index in 0..40 {
            let (from, kind) = long_life(index, 40);
            let (Kind::Kept { until } | Kind::Slow { until }) = kind else {
                panic!("a long one is not short")
            };
            assert!(from < until && until <= 1.0);
            assert!(
                from >= super::super::plan::DRAIN_AT || until <= super::super::plan::REMOVED_BY,
                "{from} {until}"
            );
        }
    }

    #[test]
    fn causes_are_told() {
        let inner = std::io::Error::other("reset");
        let fault = super::super::client::Fault::Connect(inner);
        assert_eq!(explain(&fault), "connect: reset");
    }
}
