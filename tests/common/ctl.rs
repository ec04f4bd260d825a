//! `shunt ctl` as a test runs it.

use serde_json::Value;
use shunt_lab::Host;

use super::shunt;

/// What `shunt ctl` says, and its exit code.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub error: String,
}

impl Said {
    /// The answer of a command that has to succeed.
    pub fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{self:?}");
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The last of the lines of a command that tells its progress.
    pub fn outcome(&self) -> Value {
        let last = self.out.lines().last().unwrap_or_default();
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

pub fn ctl(host: &Host, arguments: &[&str]) -> Said {
    let output = host.enter(|| shunt().arg("ctl").args(arguments).output());
    let output = output.expect("the namespace is there").expect("it starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    Said { code: output.status.code().unwrap_or(-1), out: text(output.stdout), error: text(output.stderr) }
}
