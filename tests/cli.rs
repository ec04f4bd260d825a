//! The command line: mistakes are told with file and line, exit codes are what scripts expect.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Exit code of a mistake of the user's.
const USAGE: i32 = 2;

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Files(tempfile::tempdir().expect("a temporary directory"))
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).expect("a file can be written");
        path
    }
}

/// What a run wrote and how it ended; it is killed after ten seconds.
struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn run(command: &mut Command) -> Run {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let end = Instant::now() + Duration::from_secs(10);
    while child.try_wait().expect("it can be waited for").is_none() {
        if Instant::now() > end {
            child.kill().expect("it can be killed");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let Output { status, stdout, stderr } = child.wait_with_output().expect("its output");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    let run = Run { code: status.code(), stdout: text(stdout), stderr: text(stderr) };
    assert!(run.code.is_some(), "it hung: {}{}", run.stdout, run.stderr);
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    run
}

fn shunt(arguments: &[&str]) -> Run {
    run(Command::new(env!("CARGO_BIN_EXE_shunt")).args(arguments))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

const BALANCER: &str = r#"role = "balancer"
vips = ["203.0.113.10", "2001:db8::10"]
legacy = "hash"

[[service]]
name = "web"
redirect_port = 443
policy = "random"

[[server]]
name = "web-1"
address = ["10.0.0.11", "fd00::11"]
ports = { web = 41001 }
"#;

const CLIENT: &str = r#"role = "client"

[[vip]]
address = "203.0.113.10"
continuation = "auto"
"#;

const SERVER: &str = r#"role = "server"
interface = "eth0"
addresses = ["10.0.0.11"]

[[service]]
name = "web"
redirect_port = 443
service_port = 41001
"#;

const ROLES: [(&str, &str); 3] = [("balancer", BALANCER), ("client", CLIENT), ("server", SERVER)];

/// Role, what is replaced by what in its good file, the line that is wrong then, and what the message says.
const MISTAKES: [(&str, &str, &str, usize, &str); 17] = [
    (BALANCER, "legacy = \"hash\"", "lagacy = \"hash\"", 3, "lagacy"),
    (BALANCER, "\"2001:db8::10\"", "\"2001:db8::1g\"", 2, "address"),
    (BALANCER, "\"2001:db8::10\"", "\"203.0.113.10\"", 2, "twice"),
    (BALANCER, "redirect_port = 443", "redirect_port = 0", 7, "port 0"),
    (BALANCER, "redirect_port = 443", "redirect_port = 70000", 7, "70000"),
    (BALANCER, "policy = \"random\"", "policy = \"randon\"", 8, "randon"),
    (BALANCER, "{ web = 41001 }", "{ wep = 41001 }", 13, "wep"),
    (BALANCER, "\"10.0.0.11\"", "\"203.0.113.10\"", 12, "is a VIP"),
    (BALANCER, "name = \"web-1\"", "name = \"web-1\"\nweight = 0", 12, "weight"),
    (BALANCER, "policy = \"random\"", "policy = ", 8, ""),
    (CLIENT, "\"203.0.113.10\"", "\"127.0.0.1\"", 4, "VIP"),
    (CLIENT, "continuation = \"auto\"", "continuation = \"always\"", 5, "always"),
    (CLIENT, "continuation = \"auto\"", "continuation = \"auto\"\n[timers]\nprobe_ms = 0", 7, "0"),
    (CLIENT, "continuation", "continuacion", 5, "continuacion"),
    (SERVER, "addresses = [\"10.0.0.11\"]", "addresses = []", 3, "address"),
    (SERVER, "service_port = 41001", "service_port = 443", 8, "443"),
    (SERVER, "service_port = 41001", "service_prt = 41001", 8, "service_prt"),
];

#[test]
fn good_files_of_every_role_pass() {
    let files = Files::new();
    let paths = ROLES.map(|(role, good)| files.write(&format!("{role}.toml"), good));
    let run = shunt(&["check", text(&paths[0]), text(&paths[1]), text(&paths[2])]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    for path in &paths {
        assert!(run.stdout.contains(text(path)), "{}", run.stdout);
    }
}

#[test]
fn mistakes_are_told_with_file_and_line() {
    let files = Files::new();
    for (good, from, to, line, words) in MISTAKES {
        assert!(good.contains(from), "{from}");
        let path = files.write("wrong.toml", &good.replacen(from, to, 1));
        let run = shunt(&["check", text(&path)]);
        let place = format!("{}:{line}: ", path.display());
        assert_eq!(run.code, Some(USAGE), "{to}: {}", run.stderr);
        assert!(run.stderr.starts_with(&place), "{to}: {place} expected: {}", run.stderr);
        assert!(run.stderr.contains(words), "{to}: {words:?} expected: {}", run.stderr);
        // The daemon says the same.
        let role = good.lines().next().and_then(|line| line.split('"').nth(1)).expect("a role");
        let daemon = shunt(&[role, "-c", text(&path)]);
        assert_eq!(daemon.code, Some(USAGE), "{to}: {}", daemon.stderr);
        assert!(daemon.stderr.contains(&place), "{to}: {}", daemon.stderr);
    }
}

#[test]
fn mistakes_in_a_file_of_keys_are_told_with_its_line_and_without_its_text() {
    use std::os::unix::fs::PermissionsExt as _;
    const SECRET: &str = "00112233445566778899aabbccddeeff";
    let files = Files::new();
    let keys = files.write("keys", &format!("# ours\n0 {SECRET}\n0 {SECRET}\n"));
    let mode = |mode| std::fs::set_permissions(&keys, std::fs::Permissions::from_mode(mode)).expect("a mode");
    for (role, good) in ROLES.into_iter().filter(|(role, _)| *role != "client") {
        let table = format!("{good}\n[token]\nkeys = \"{}\"\nrequire = \"always\"\n", keys.display());
        let path = files.write("tokens.toml", &table);
        mode(0o600);
        let run = shunt(&["check", text(&path)]);
        assert_eq!(run.code, Some(USAGE), "{role}: {}", run.stderr);
        let place = format!("{}:3: this number has a key already", keys.display());
        assert!(run.stderr.starts_with(&place) && !run.stderr.contains(SECRET), "{role}: {}", run.stderr);
        mode(0o644);
        let run = shunt(&["check", text(&path)]);
        assert_eq!(run.code, Some(USAGE), "{role}: {}", run.stderr);
        assert!(run.stderr.contains("others can read"), "{role}: {}", run.stderr);
    }
}

#[test]
fn unknown_keys_are_refused_at_every_place() {
    let files = Files::new();
    for (role, good) in ROLES {
        let mut places: Vec<String> = vec![good.replacen('\n', "\nunknown_key = 1\n", 1)];
        places.push(format!("{good}unknown_key = 1\n"));
        places.push(format!("{good}\n[host]\nunknown_key = 1\n"));
        places.push(format!("{good}\n[unknown_key]\n"));
        for wrong in places {
            let line = 1 + wrong.lines().position(|line| line.contains("unknown_key")).expect("it is there");
            let path = files.write("unknown.toml", &wrong);
            let run = shunt(&["check", text(&path)]);
            assert_eq!(run.code, Some(USAGE), "{role}: {wrong}\n{}", run.stderr);
            let place = format!("{}:{line}: ", path.display());
            assert!(run.stderr.contains(&place), "{role}: {place} expected:\n{wrong}\n{}", run.stderr);
            assert!(run.stderr.contains("unknown_key"), "{role}: {}", run.stderr);
        }
    }
}

#[test]
fn every_file_is_checked_and_one_mistake_counts() {
    let files = Files::new();
    let good = files.write("good.toml", CLIENT);
    let bad = files.write("bad.toml", "role = \"client\"\nx = 1\n");
    let worse = files.write("worse.toml", "role = \n");
    let run = shunt(&["check", text(&bad), text(&worse), text(&good)]);
    assert_eq!(run.code, Some(USAGE));
    assert!(run.stderr.contains("bad.toml:2: ") && run.stderr.contains("worse.toml:1: "), "{}", run.stderr);
    assert!(run.stdout.contains("good.toml"), "{}", run.stdout);
}

#[test]
fn a_role_that_is_missing_unknown_or_anothers_is_refused() {
    let files = Files::new();
    let none = files.write("none.toml", "vips = [\"203.0.113.10\"]\n");
    let run = shunt(&["check", text(&none)]);
    assert_eq!(run.code, Some(USAGE));
    assert!(run.stderr.contains("role"), "{}", run.stderr);
    let odd = files.write("odd.toml", "role = \"router\"\n");
    let run = shunt(&["check", text(&odd)]);
    assert_eq!(run.code, Some(USAGE));
    assert!(run.stderr.contains("odd.toml:1: ") && run.stderr.contains("router"), "{}", run.stderr);
    for (daemon, _) in ROLES {
        for (role, good) in ROLES.into_iter().filter(|(role, _)| *role != daemon) {
            let path = files.write("another.toml", good);
            let run = shunt(&[daemon, "-c", text(&path)]);
            assert_eq!(run.code, Some(USAGE), "{daemon} with a {role}'s file: {}", run.stderr);
            let place = format!("{}:1: ", path.display());
            assert!(run.stderr.contains(&place), "{daemon} with a {role}'s file: {}", run.stderr);
            assert!(run.stderr.contains(daemon) && run.stderr.contains(role), "{}", run.stderr);
        }
    }
}

#[test]
fn files_that_cannot_be_read_are_explained() {
    let files = Files::new();
    let missing = files.0.path().join("missing.toml");
    let folder = files.0.path().to_owned();
    for path in [&missing, &folder] {
        for arguments in [&["check"][..], &["balancer", "-c"], &["client", "-c"], &["server", "-c"]] {
            let run = shunt(&[arguments, &[text(path)]].concat());
            assert_eq!(run.code, Some(USAGE), "{arguments:?}: {}", run.stderr);
            assert!(run.stderr.contains(text(path)), "{arguments:?}: {}", run.stderr);
        }
    }
    let binary = files.0.path().join("binary.toml");
    std::fs::write(&binary, b"role = \"client\"\n\xff\xfe\n").expect("a file can be written");
    let run = shunt(&["check", text(&binary)]);
    assert_eq!(run.code, Some(USAGE));
    assert!(run.stderr.contains("binary.toml:2: "), "{}", run.stderr);
}

#[test]
fn without_privileges_a_daemon_says_what_is_missing() {
    let files = Files::new();
    // Where anybody can execute it.
    let program = files.0.path().join("shunt");
    std::fs::copy(env!("CARGO_BIN_EXE_shunt"), &program).expect("the program can be copied");
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(files.0.path(), everybody).expect("the folder can be opened");
    for (role, good) in ROLES {
        let path = files.write(&format!("{role}.toml"), good);
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set=-all"]);
        let run = run(command.arg(&program).args([role, "-c", text(&path)]));
        println!("{role}: {}", run.stderr);
        assert!(!matches!(run.code, Some(0 | 127)), "{role}: {}", run.stderr);
        let told = ["root", "CAP_NET_ADMIN"].iter().any(|word| run.stderr.contains(word));
        assert!(told, "{role} does not say which privilege is missing: {}", run.stderr);
    }
}

#[test]
fn help_lists_the_flags_of_each_subcommand() {
    let common = ["--verbose", "--help", "--version"];
    let expected: [(&str, &[&str]); 6] = [
        ("balancer", &["--config", "--capture"]),
        ("client", &["--config", "--capture", "--forward", "--socks5"]),
        ("server", &["--config", "--capture"]),
        ("check", &["<FILE>"]),
        ("doctor", &["[FILE]", "--json", "--all"]),
        ("demo", &["--json", "--connections"]),
    ];
    let overview = shunt(&["--help"]);
    assert_eq!(overview.code, Some(0));
    for (command, flags) in expected {
        assert!(overview.stdout.contains(&format!("\n  {command} ")), "{command}: {}", overview.stdout);
        let run = shunt(&[command, "--help"]);
        assert_eq!(run.code, Some(0), "{command}");
        for flag in common.iter().chain(flags) {
            assert!(run.stdout.contains(flag), "{command} {flag}: {}", run.stdout);
        }
    }
    assert!(!overview.stdout.contains("demo-server"), "{}", overview.stdout);
}

#[test]
fn wrong_arguments_are_refused() {
    for arguments in [&[][..], &["balancer"], &["check"], &["blancer"], &["demo", "--connections", "x"]] {
        let run = shunt(arguments);
        assert_eq!(run.code, Some(USAGE), "{arguments:?}");
        assert!(run.stderr.contains("Usage:") || run.stderr.contains("--help"), "{}", run.stderr);
    }
    let files = Files::new();
    let client = files.write("client.toml", CLIENT);
    let run = shunt(&["client", "-c", text(&client), "--forward", "nonsense"]);
    assert!(!matches!(run.code, Some(0)), "{}", run.stderr);
    assert!(run.stderr.contains("nonsense"), "{}", run.stderr);
}
