//! Traffic in bulk: many connections, and transfers whose checksums are compared.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use shunt_lab::{Child, Host};

use super::{Family, Net, WEB, WEB_SERVICE};

/// What curl is to say of each transfer: a line that begins with `|`, whatever headers there were.
const REPORT: &str = "|%{exitcode}|%{http_code}|%header{x-port}|%header{x-server}|%{time_connect}|%{time_total}|%{size_download}|%{size_upload}\\n";

/// One line of [`REPORT`].
#[derive(Debug, Clone)]
struct Report {
    exit: u8,
    status: u16,
    port: u16,
    server: String,
    seconds: f64,
    bytes: u64,
}

impl Report {
    fn parse(line: &str) -> Option<Report> {
        let fields: Vec<&str> = line.strip_prefix('|')?.trim_end().split('|').collect();
        let [exit, status, port, server, _, total, down, up] = fields[..] else { return None };
        Some(Report {
            exit: exit.parse().ok()?,
            status: status.parse().unwrap_or(0),
            port: port.parse().unwrap_or(0),
            server: server.to_owned(),
            seconds: total.parse().ok()?,
            bytes: down.parse::<u64>().ok()?.max(up.parse().ok()?),
        })
    }

    fn redirected(&self) -> bool {
        self.port > WEB_SERVICE
    }
}

/// What became of many connections.
#[derive(Debug, Default)]
pub struct Tally {
    pub redirected: usize,
    pub plain: usize,
    /// Everything that went wrong, with what was seen of it.
    pub broken: Vec<String>,
    /// Good ones by server.
    pub servers: BTreeMap<String, usize>,
}

impl Tally {
    pub fn total(&self) -> usize {
        self.redirected + self.plain + self.broken.len()
    }

    fn read(&mut self, text: &str) {
        let mut body = String::new();
        for line in text.lines() {
            let Some(report) = Report::parse(line) else {
                body.push_str(line);
                continue;
            };
            let right = body == format!("hello from {}", report.server);
            if report.exit != 0 || report.status != 200 || !right {
                self.broken.push(format!("{body:?} {line}"));
            } else {
                let kind = if report.redirected() { &mut self.redirected } else { &mut self.plain };
                *kind += 1;
                *self.servers.entry(report.server).or_default() += 1;
            }
            body.clear();
        }
    }
}

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// GET.
    Down,
    /// PUT.
    Up,
}

impl Way {
    pub const BOTH: [Way; 2] = [Way::Down, Way::Up];
}

/// A file that every server has.
#[derive(Debug, Clone)]
pub struct TestFile {
    pub name: String,
    pub path: PathBuf,
    pub bytes: u64,
    pub sum: String,
}

/// curl moving a [`TestFile`].
pub struct Transfer {
    pub family: Family,
    pub way: Way,
    pub child: Child,
    file: TestFile,
    received: PathBuf,
    upload: String,
    command: String,
}

/// A transfer that ended well.
#[derive(Debug, Clone)]
pub struct Finished {
    pub redirected: bool,
    pub server: String,
    pub seconds: f64,
    pub bytes: u64,
    /// The command that made the figures.
    pub command: String,
}

impl Finished {
    /// Megabits a second.
    #[expect(clippy::cast_precision_loss, reason = "a figure to be shown")]
    pub fn megabits(&self) -> f64 {
        self.bytes as f64 * 8e-6 / self.seconds
    }
}

impl Net {
    /// `count` connections with a request each, by `processes` curls at the same time.
    pub fn connections(&self, family: Family, count: usize, processes: usize) -> Tally {
        let mut running = Vec::new();
        for number in 0..processes {
            let share = count / processes + usize::from(number < count % processes);
            let list = self.file(&format!("urls{number}"));
            let line = format!("url = \"{}\"\n", family.url(WEB, "/"));
            std::fs::write(&list, line.repeat(share)).expect("a file can be written");
            let mut command = Command::new("curl");
            command
                .args(["-sS", "--max-time", "60", "-H", "Connection: close", "-w", REPORT, "-K"])
                .arg(&list);
            let log = self.file(&format!("curl{number}.log"));
            running.push(self.client.spawn_logged(&mut command, log).expect("curl starts"));
        }
        let mut tally = Tally::default();
        let end = Instant::now() + Duration::from_secs(120);
        for mut child in running {
            let left = end.saturating_duration_since(Instant::now());
            let ended = child.wait_timeout(left).expect("curl can be waited for").is_some();
            tally.read(&child.log().expect("curl's output can be read"));
            assert!(ended, "curl hangs: {tally:?}\n{}", self.logs());
        }
        assert_eq!(tally.total(), count, "a report of each connection: {tally:?}");
        tally
    }

    /// Makes a file of `mebibytes` that no part of is like another, and gives it to every server.
    pub fn make_file(&self, name: &str, mebibytes: u64) -> TestFile {
        let path = self.file(name);
        write_noise(&path, mebibytes);
        for server in &self.servers {
            std::fs::hard_link(&path, self.root(server.number).join(name)).expect("a link can be made");
        }
        TestFile { name: name.to_owned(), sum: sha256(&path), bytes: mebibytes << 20, path }
    }

    /// Starts moving `file`, with further arguments for curl.
    pub fn start_transfer(&self, family: Family, way: Way, file: &TestFile, extra: &[&str]) -> Transfer {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (received, upload) = (self.file(&format!("received{number}")), format!("upload{number}"));
        let mut command = Command::new("curl");
        command.args(["-sS", "--fail", "--max-time", "100", "-w", REPORT]).args(extra);
        let (arguments, url) = match way {
            Way::Down => {
                command.arg("-o").arg(&received);
                ("-o FILE", family.url(WEB, &format!("/{}", file.name)))
            }
            Way::Up => {
                command.arg("-o").arg("/dev/null").arg("-T").arg(&file.path);
                ("-T FILE", family.url(WEB, &format!("/up/{upload}")))
            }
        };
        command.arg(&url);
        let log = self.file(&format!("transfer{number}.log"));
        let child = self.client.spawn_logged(&mut command, log).expect("curl starts");
        let command = format!(
            "curl {}{arguments} {url}",
            extra.iter().fold(String::new(), |text, word| text + word + " ")
        );
        Transfer { family, way, child, file: file.clone(), received, upload, command }
    }

    /// Waits for a transfer and compares the checksums; the copy is removed.
    ///
    /// # Panics
    /// It failed, was not whole, or did not end.
    pub fn finish(&self, mut transfer: Transfer) -> Finished {
        let (family, way) = (transfer.family, transfer.way);
        let status = transfer.child.wait_timeout(Duration::from_secs(110)).expect("curl can be waited for");
        let log = transfer.child.log().expect("curl's output can be read");
        let context = || {
            format!("{family:?} {way:?}: {} ended with {status:?}: {log}\n{}", transfer.command, self.logs())
        };
        let report = log.lines().find_map(Report::parse).unwrap_or_else(|| panic!("{}", context()));
        assert!(status.is_some_and(|status| status.success()) && report.exit == 0, "{}", context());
        let copy = match way {
            Way::Down => transfer.received.clone(),
            Way::Up => self.dir.path().join(&report.server).join("up").join(&transfer.upload),
        };
        assert_eq!(sha256(&copy), transfer.file.sum, "checksums differ: {}", context());
        std::fs::remove_file(&copy).expect("a file can be removed");
        Finished {
            redirected: report.redirected(),
            server: report.server,
            seconds: report.seconds,
            bytes: report.bytes,
            command: transfer.command,
        }
    }

    /// Starts and finishes one.
    pub fn transfer(&self, family: Family, way: Way, file: &TestFile) -> Finished {
        self.finish(self.start_transfer(family, way, file, &[]))
    }

    /// Waits until the balancer's log has `text` at least `times` times.
    pub fn wait_for_balancer(&self, text: &str, times: usize) {
        let process = self.balancer_process.as_ref().expect("the balancer runs");
        let end = Instant::now() + Duration::from_secs(10);
        while process.log().expect("its log").matches(text).count() < times {
            assert!(Instant::now() < end, "the balancer does not log {text:?}:\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Everything of a host that the daemons may change: links, rules, routes, nftables, kernel settings.
pub fn host_state(host: &Host) -> String {
    let script = "ip link; ip -4 rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all; \
                  nft list ruleset; sysctl -e -a -r '^net\\.ipv[46]\\.' 2>/dev/null | grep -v -e dst_entries -e stable_secret";
    let output = host
        .run_within(Command::new("sh").args(["-c", script]), Duration::from_secs(20))
        .expect("ip, nft and sysctl are installed");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The lines that only one of two states has, `-` before and `+` after.
pub fn difference(before: &str, after: &str) -> String {
    let mut text = String::new();
    for (sign, one, other) in [('-', before, after), ('+', after, before)] {
        for line in one.lines().filter(|line| !other.lines().any(|known| known == *line)) {
            let _ = writeln!(text, "{sign} {line}");
        }
    }
    text
}

/// A counter of the host's kernel, as `nstat` names it: `IcmpInDestUnreachs`, `Icmp6InPktTooBigs`.
pub fn kernel_counter(host: &Host, name: &str) -> u64 {
    let mut command = Command::new("nstat");
    command.args(["-a", "-s", "-z", name]);
    let output = host.run_within(&mut command, Duration::from_secs(10)).expect("nstat is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    value.unwrap_or_else(|| panic!("nstat knows no {name}: {text}"))
}

/// sha256sum of a file, in hexadecimal.
pub fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().expect("a sum").to_owned()
}

/// Pseudo-random bytes (splitmix64).
fn write_noise(path: &Path, mebibytes: u64) {
    let mut file = std::fs::File::create(path).expect("a file can be made");
    let mut block = vec![0; 1 << 20];
    let mut state = mebibytes;
    for _ in 0..mebibytes {
        for word in block.chunks_exact_mut(8) {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            word.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
        }
        file.write_all(&block).expect("room for the file");
    }
}
