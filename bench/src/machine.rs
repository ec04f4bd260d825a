//! The machine on which was measured.

use procfs::{CpuInfo, Current as _, LoadAverage, Meminfo};

/// More running before the first run than this is more than nothing.
const QUIET: f32 = 0.7;

/// Lines that describe the machine, `load` being the load average before the first run; what it does not tell is left out.
pub fn describe(load: Option<f32>) -> Vec<String> {
    let mut lines = Vec::new();
    if let Ok(processors) = CpuInfo::current() {
        let model = processors.model_name(0).unwrap_or("unknown model").to_owned();
        lines.push(format!("processors: {} ({model})", processors.num_cores()));
    }
    if let Ok(memory) = Meminfo::current() {
        lines.push(format!("memory: {} MiB", memory.mem_total >> 20));
    }
    if let Ok(release) = std::fs::read_to_string("/proc/sys/kernel/osrelease") {
        lines.push(format!("kernel: Linux {}", release.trim()));
    }
    lines.extend(load.map(|load| format!("load average of the last minute before the first run: {load:.2}")));
    lines
}

/// The load average of the last minute.
pub fn load() -> Option<f32> {
    LoadAverage::current().ok().map(|load| load.one)
}

/// What to say if others worked on this machine before.
pub fn busy(load: Option<f32>) -> Option<String> {
    let load = load.filter(|load| *load > QUIET)?;
    Some(format!(
        "others were at work on this machine (load average {load:.2}): trust ratios rather than figures"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_machine_is_told_of() {
        assert!(busy(Some(3.0)).is_some_and(|text| text.contains("3.00")));
        assert_eq!((busy(Some(0.2)), busy(None)), (None, None));
        assert!(describe(Some(1.5)).iter().any(|line| line.ends_with(" 1.50")));
        assert!(describe(None).iter().any(|line| line.starts_with("kernel: Linux")));
    }
}
