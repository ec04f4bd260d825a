//! What this machine has of the programs that are compared and that measure, and what the balancer under test knows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::config;
use crate::contestant::Contestant;

/// The programs, and what of them can be used.
#[derive(Debug)]
pub struct Installed {
    /// The program under test.
    pub shunt: PathBuf,
    /// Where nginx's module stream is, if it is a file of its own.
    pub stream_module: Option<PathBuf>,
    /// How many files a process may open.
    pub open_files: u64,
    missing: BTreeMap<Contestant, String>,
    known_keys: Vec<&'static str>,
    /// Whether the balancer was asked which keys it knows.
    asked: bool,
}

/// Where Debian, Fedora and Alpine keep modules of nginx.
const MODULE_FOLDERS: [&str; 3] =
    ["/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/etc/nginx/modules"];

impl Installed {
    /// Looks for everything that `contestants` need; files go to `folder`.
    ///
    /// # Errors
    /// What measures is missing, or the program under test does not take the configuration.
    pub fn find(contestants: &[Contestant], shunt: Option<PathBuf>, folder: &Path) -> Result<Installed> {
        for (program, package) in [("iperf3", "iperf3"), ("wrk", "wrk"), ("nginx", "nginx-light")] {
            if version(program, &["-v"]).is_none() {
                bail!("the program {program} is missing: install the package {package}, or run bench/run.sh");
            }
        }
        let shunt = shunt.map_or_else(beside_this, Ok)?;
        let mut found = Installed {
            shunt,
            stream_module: None,
            open_files: raise_open_files()?,
            missing: BTreeMap::new(),
            known_keys: Vec::new(),
            asked: false,
        };
        found.find_peers();
        if contestants.iter().any(|contestant| contestant.is_shunt()) {
            found.find_keys(folder)?;
        }
        Ok(found)
    }

    fn find_peers(&mut self) {
        for (contestant, program, package) in
            [(Contestant::Nft, "nft", "nftables"), (Contestant::Haproxy, "haproxy", "haproxy")]
        {
            if version(program, &["-v"]).is_none() {
                let why = format!("the program {program} is missing: install the package {package}");
                self.missing.insert(contestant, why);
            }
        }
        let file = "ngx_stream_module.so";
        self.stream_module =
            MODULE_FOLDERS.iter().map(|folder| Path::new(folder).join(file)).find(|path| path.exists());
        let built_in = version("nginx", &["-V"])
            .is_some_and(|text| text.split_whitespace().any(|word| word == "--with-stream"));
        if self.stream_module.is_none() && !built_in {
            let why = "nginx has no module stream: install the package libnginx-mod-stream";
            self.missing.insert(Contestant::Nginx, why.to_owned());
        }
    }

    /// Which keys of the table `[host]` the balancer takes.
    fn find_keys(&mut self, folder: &Path) -> Result<()> {
        if let Some(why) = self.refuses(&[], folder)? {
            bail!("{} does not take the configuration of the bench: {why}", self.shunt.display());
        }
        self.asked = true;
        for contestant in Contestant::all() {
            for key in contestant.host_keys() {
                if !self.known_keys.contains(key) && self.refuses(&[key], folder)?.is_none() {
                    self.known_keys.push(key);
                }
            }
        }
        for contestant in Contestant::all() {
            if let Some(key) = contestant.needs_key()
                && !self.known_keys.contains(&key)
            {
                let why = format!("this balancer does not know `{key}` in its table [host]");
                self.missing.insert(*contestant, why);
            }
        }
        Ok(())
    }

    /// What the program says against a configuration with `keys`.
    fn refuses(&self, keys: &[&str], folder: &Path) -> Result<Option<String>> {
        let file = folder.join("check.toml");
        std::fs::write(&file, config::balancer(keys))
            .with_context(|| format!("writing {}", file.display()))?;
        let output = Command::new(&self.shunt).arg("check").arg(&file).output();
        let output = output.with_context(|| {
            format!("starting {} (`cargo build --release --workspace` builds it)", self.shunt.display())
        })?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Ok((!output.status.success()).then_some(said))
    }

    /// Why a contestant cannot take part, if it cannot.
    pub fn missing(&self, contestant: Contestant) -> Option<&str> {
        self.missing.get(&contestant).map(String::as_str)
    }

    /// Whether a contestant may have so many connections; a proxy opens two files for each.
    pub fn can_open(&self, contestant: Contestant, connections: usize) -> bool {
        let workers = match contestant {
            Contestant::Haproxy => 1,
            // One for each processor, among which connections are spread, never quite evenly.
            Contestant::Nginx => {
                std::thread::available_parallelism().map_or(1, |count| count.get().div_ceil(2))
            }
            _ => return true,
        };
        let files = 2 * connections as u64 / workers as u64;
        files + config::FILES_BESIDE <= self.open_files
    }

    /// The lines of a contestant's table `[host]` that the balancer knows.
    pub fn host_keys(&self, contestant: Contestant) -> Vec<&'static str> {
        contestant.host_keys().iter().copied().filter(|key| self.known_keys.contains(key)).collect()
    }

    /// What to say of contestants that are not what their names promise.
    pub fn remarks(&self) -> Vec<String> {
        let keys = Contestant::ShuntTun.host_keys();
        if !self.asked || keys.iter().all(|key| self.known_keys.contains(key)) {
            return Vec::new();
        }
        let keys = keys.join(", ");
        vec![format!("this balancer does not know `{keys}`: shunt and shunt_tun are the same, a TUN device")]
    }

    /// The versions of what was used, a line each.
    pub fn versions(&self) -> Vec<String> {
        let shunt = self.shunt.to_string_lossy();
        let programs: [(&str, &[&str]); 6] = [
            (&shunt, &["--version"]),
            ("haproxy", &["-v"]),
            ("nginx", &["-v"]),
            ("nft", &["-v"]),
            ("iperf3", &["-v"]),
            ("wrk", &["-v"]),
        ];
        let lines = programs.into_iter().filter_map(|(program, arguments)| {
            version(program, arguments)?.lines().next().map(|line| line.trim().to_owned())
        });
        lines.collect()
    }
}

/// What a program says of itself on either stream, whatever its exit code; `None` if it cannot be started.
fn version(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// Both programs are built into the same folder.
fn beside_this() -> Result<PathBuf> {
    let this = std::env::current_exe().context("finding this program")?;
    Ok(this.with_file_name("shunt"))
}

/// Raises the limit of open files, which the programs started here inherit; what it is then.
fn raise_open_files() -> Result<u64> {
    const ENOUGH: u64 = 400_000;
    let (_, hard) = rlimit::Resource::NOFILE.get().context("reading the limit of open files")?;
    let wanted = ENOUGH.max(hard);
    if rlimit::Resource::NOFILE.set(wanted, wanted).is_ok() {
        return Ok(wanted);
    }
    // Without the privilege, as far as it goes.
    rlimit::increase_nofile_limit(wanted).context("raising the limit of open files")
}
