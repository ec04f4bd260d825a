//! Privileges, devices, kernel features and settings.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use super::{Finding, Needs, Severity};
use crate::change::{Change, Sysctl};
use crate::nft;
use crate::prefix::Family;
use crate::sysctl;

/// `CAP_NET_ADMIN`'s bit.
const NET_ADMIN: u32 = 12;

/// Whether routes and devices may be changed.
pub(super) fn privileges() -> Vec<Finding> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let held = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
    let finding = match held {
        Some(held) if held >> NET_ADMIN & 1 == 1 => Finding::good("privileges", "CAP_NET_ADMIN is held"),
        Some(_) => Finding::new(
            Severity::Error,
            "privileges",
            "CAP_NET_ADMIN is not held: neither devices nor routes can be made, and part of what follows cannot be seen",
            "run as root, or with `AmbientCapabilities=CAP_NET_ADMIN` under systemd, or in a container with \
             `--cap-add NET_ADMIN`",
        ),
        None => Finding::new(
            Severity::Warning,
            "privileges",
            "/proc/self/status does not say which capabilities are held",
            "mount /proc",
        ),
    };
    vec![finding]
}

/// Whether TUN devices can be made.
pub(super) fn devices() -> Vec<Finding> {
    let path = "/dev/net/tun";
    let finding = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Finding::good("tun", format!("{path} can be opened")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::new(
            Severity::Error,
            "tun",
            format!("there is no {path}"),
            "`modprobe tun`; in a container, `--device /dev/net/tun`",
        ),
        Err(error) => Finding::new(
            Severity::Error,
            "tun",
            format!("{path} cannot be opened: {error}"),
            "give this user the right to read and write it; in a container, `--device /dev/net/tun`",
        ),
    };
    vec![finding]
}

/// Whether packets can be marked.
pub(super) async fn nftables() -> Finding {
    if nft::nft_available().await {
        return Finding::good("nftables", "rules as ours can be made");
    }
    Finding::new(
        Severity::Warning,
        "nftables",
        "this kernel takes no nftables rules as ours: all TCP of a server's services passes its agent, and routers' ICMP \
         errors reach neither shim nor agent",
        "`modprobe nf_tables`, or a kernel with CONFIG_NF_TABLES_INET, CONFIG_NFT_CT and CONFIG_NETFILTER; and run this as root",
    )
}

/// Programs that undo what others have changed.
pub(super) fn managers() -> Vec<Finding> {
    let mut findings = Vec::new();
    if Path::new("/run/systemd/netif/state").exists() && !networkd_leaves_rules() {
        findings.push(Finding::new(
            Severity::Warning,
            "networkd",
            "systemd-networkd runs, and removes policy rules and routes that are not its own whenever it is restarted",
            "write `[Network]`, `ManageForeignRoutingPolicyRules=no` and `ManageForeignRoutes=no` into \
             /etc/systemd/networkd.conf.d/shunt.conf and restart it once",
        ));
    }
    findings
}

fn networkd_leaves_rules() -> bool {
    let mut files = vec![Path::new("/etc/systemd/networkd.conf").to_owned()];
    for folder in ["/etc", "/run", "/usr/lib"] {
        let folder = Path::new(folder).join("systemd/networkd.conf.d");
        files.extend(fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()));
    }
    let says = |key: &str| {
        files.iter().filter_map(|file| fs::read_to_string(file).ok()).any(|text| {
            text.lines().filter_map(|line| line.split_once('=')).any(|(name, value)| {
                name.trim() == key && matches!(value.trim(), "no" | "false" | "off" | "0")
            })
        })
    };
    says("ManageForeignRoutingPolicyRules") && says("ManageForeignRoutes")
}

/// Whether the kernel has the families that are asked for.
pub(super) fn families(needs: &Needs) -> Vec<Finding> {
    let asked = |family| {
        let own = needs.own.iter().chain(&needs.reach).any(|address| Family::of(*address) == family);
        own || needs
            .changes
            .iter()
            .any(|change| matches!(change, Change::Rule(rule) if rule.family == family))
    };
    if !asked(Family::V6) {
        return Vec::new();
    }
    let folder = "/proc/sys/net/ipv6/conf";
    if !Path::new(folder).exists() {
        return vec![Finding::new(
            Severity::Error,
            "ipv6",
            "the configuration has IPv6 addresses, but this kernel, or this network namespace, has no IPv6",
            "boot without `ipv6.disable=1`, or leave the IPv6 addresses out",
        )];
    }
    needs
        .interfaces
        .iter()
        .filter(|interface| {
            sysctl::read(&format!("net/ipv6/conf/{interface}/disable_ipv6"))
                .is_ok_and(|value| value.as_deref() == Some("1"))
        })
        .map(|interface| {
            Finding::new(
                Severity::Error,
                "ipv6",
                format!("IPv6 is switched off on {interface}"),
                format!("`sysctl -w net.ipv6.conf.{interface}.disable_ipv6=0`"),
            )
        })
        .collect()
}

/// Whether the settings that a daemon needs are there, or can be made.
pub(super) fn sysctls(needs: &Needs) -> Vec<Finding> {
    let wanted = needs.changes.iter().filter_map(|change| match change {
        Change::Sysctl(sysctl) => Some(sysctl),
        _ => None,
    });
    let mut findings: Vec<Finding> = Vec::new();
    let mut right = 0;
    for sysctl in wanted {
        match compare(sysctl) {
            Some(finding) if !findings.contains(&finding) => findings.push(finding),
            Some(_) => {}
            None => right += 1,
        }
    }
    if findings.is_empty() && right > 0 {
        findings.push(Finding::good("sysctl", format!("all {right} settings are as they must be")));
    }
    findings
}

/// `None` if it is right, or is about a device that the daemon will make.
fn compare(wanted: &Sysctl) -> Option<Finding> {
    let dotted = wanted.key.replace('/', ".");
    let now = match sysctl::read(&wanted.key) {
        Ok(Some(now)) => now,
        Ok(None) => {
            let folder = Path::new("/proc/sys").join(&wanted.key);
            let of_a_device_to_come =
                wanted.key.contains("/conf/") && folder.parent().is_some_and(|folder| !folder.exists());
            if wanted.optional || of_a_device_to_come {
                return None;
            }
            let found = format!("this kernel has no {dotted}");
            return Some(Finding::new(
                Severity::Error,
                "sysctl",
                found,
                "use a newer kernel, or mount /proc/sys",
            ));
        }
        Err(error) => {
            return Some(Finding::new(Severity::Error, "sysctl", error.to_string(), "run this as root"));
        }
    };
    if now == sysctl::normal(&wanted.value) {
        return None;
    }
    let value = &wanted.value;
    let writable = OpenOptions::new().write(true).open(Path::new("/proc/sys").join(&wanted.key));
    Some(match writable {
        Ok(_) => Finding::new(
            Severity::Note,
            "sysctl",
            format!("{dotted} is {now}; the daemon sets it to {value} while it runs, and back"),
            "",
        ),
        Err(error) => Finding::new(
            Severity::Error,
            "sysctl",
            format!("{dotted} is {now}, must be {value}, and cannot be written: {error}"),
            format!(
                "`sysctl -w {dotted}={value}` as root, or `--sysctl {dotted}={value}` where the container is made"
            ),
        ),
    })
}
