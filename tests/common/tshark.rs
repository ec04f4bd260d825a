//! Wireshark's view of captures.

use std::path::Path;
use std::process::Command;

/// The fields that tshark, told `arguments`, reads in the frames of a capture: a line each.
pub fn tshark(file: &Path, arguments: &[&str], fields: &[&str]) -> Vec<Vec<String>> {
    let mut command = Command::new("tshark");
    command.args(arguments).arg("-r").arg(file).args(["-T", "fields"]);
    for field in fields {
        command.args(["-e", field]);
    }
    let output = command.output().expect("this test needs tshark (Debian: apt install tshark)");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !errors.contains("Lua"), "{errors}");
    let text = String::from_utf8(output.stdout).expect("tshark writes UTF-8");
    text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}
