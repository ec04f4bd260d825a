//! The machine on which was measured.

use procfs::{CpuInfo, Current as _, LoadAverage, Meminfo};

/// Lines that describe the machine; what it does not tell is left out.
pub fn describe() -> Vec<String> {
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
    lines.extend(
        load().map(|load| format!("load average of the last minute before the first run: {load:.2}")),
    );
    lines
}

/// The load average of the last minute.
pub fn load() -> Option<f32> {
    LoadAverage::current().ok().map(|load| load.one)
}
