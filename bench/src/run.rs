//! The rounds: every contestant in turn, again and again.

use std::io::IsTerminal as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::arguments::Plan;
use crate::contestant::Contestant;
use crate::installed::Installed;
use crate::measure::{Measure, memory};
use crate::results::Results;
use crate::world::World;

/// Builds the worlds and measures all that the plan says. What fails is told in the results and does not end the rest.
///
/// # Errors
/// Nothing can be measured at all: no namespaces here, or nothing to compare with.
pub fn run(plan: &Plan, installed: &Installed, folder: &Path) -> Result<Results> {
    let mut results = Results::new(installed.remarks());
    let bar = progress(plan);
    let mut worlds = Vec::new();
    for contestant in &plan.contestants {
        if let Some(why) = installed.missing(*contestant) {
            bar.suspend(|| eprintln!("left out: {}: {why}", contestant.name()));
            results.left_out.push((*contestant, why.to_owned()));
            continue;
        }
        bar.set_message(format!("building the hosts of {}", contestant.name()));
        match World::build(*contestant, installed, folder).and_then(|world| world.verify().map(|()| world)) {
            Ok(world) => worlds.push(world),
            Err(error) if *contestant == Contestant::Direct => return Err(error).context("direct"),
            Err(error) => fail(&mut results, &bar, &format!("{}: {error:#}", contestant.name())),
        }
    }
    for round in 0..plan.rounds {
        results.begin_round();
        for measure in &plan.measures {
            // Whoever comes first each time might find the machine cooler, or the others quieter.
            let first = round as usize % worlds.len();
            for world in worlds[first..].iter().chain(&worlds[..first]) {
                bar.set_message(format!("{}, {}", world.contestant.name(), measure.name()));
                measure_one(&mut results, &bar, world, *measure, plan.time);
                bar.inc(1);
            }
        }
    }
    for world in worlds.iter_mut().filter(|world| plan.memory_of.contains(&world.contestant)) {
        bar.set_message(format!("{}, memory", world.contestant.name()));
        measure_memory(&mut results, &bar, world, &plan.connections, installed);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(results)
}

fn measure_one(results: &mut Results, bar: &ProgressBar, world: &World, measure: Measure, time: Duration) {
    let contestant = world.contestant;
    match measure.run(world, time) {
        Ok(figures) => {
            for (figure, value) in figures {
                results.add(contestant, figure, value);
            }
        }
        Err(error) => {
            let text = format!("{}, {}: {error:#}\n{}", contestant.name(), measure.name(), world.logs());
            fail(results, bar, &text);
        }
    }
}

fn measure_memory(
    results: &mut Results,
    bar: &ProgressBar,
    world: &mut World,
    counts: &[usize],
    installed: &Installed,
) {
    let contestant = world.contestant;
    let (counts, too_many): (Vec<usize>, Vec<usize>) =
        counts.iter().partition(|count| installed.can_open(contestant, **count));
    for count in too_many {
        results.remarks.push(format!(
            "{} with {count} connections was not measured: it takes more open files than a process may have here ({})",
            contestant.name(),
            installed.open_files
        ));
    }
    let seen = |connections, kilobytes| results.add_memory(contestant, connections, kilobytes);
    match memory::with_connections(world, &counts, seen) {
        Ok(0) => {}
        Ok(again) => results.remarks.push(format!(
            "{}: {again} connections were reset while they opened, and tried again",
            contestant.name()
        )),
        Err(error) => {
            let text = format!("{}, memory: {error:#}\n{}", contestant.name(), world.logs());
            fail(results, bar, &text);
        }
    }
}

fn fail(results: &mut Results, bar: &ProgressBar, text: &str) {
    let text = text.trim_end().to_owned();
    bar.suspend(|| eprintln!("failed: {text}"));
    // What programs logged is for who runs it, not for the document.
    results.failures.push(text.lines().next().unwrap_or_default().to_owned());
}

fn progress(plan: &Plan) -> ProgressBar {
    let runs = plan.contestants.len() * plan.measures.len() * plan.rounds as usize + plan.memory_of.len();
    let style = ProgressStyle::with_template("{elapsed:>4} {bar:40} {pos}/{len} {msg}");
    let bar =
        ProgressBar::new(runs as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
