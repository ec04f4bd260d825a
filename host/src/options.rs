//! What the three roles' files have in common: the option's identifier and the numbers used on the host.

use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::config::{ConfigError, Role, Source};
use crate::kernel::LOCAL_PREFERENCE;

/// Route tables a client or a server may use, from [`HostOptions::table`] on.
pub const TABLES: u32 = 256;
/// The same of a balancer, which may need one a server.
pub const BALANCER_TABLES: u32 = 1024;
/// Rule preferences a daemon may use, from [`HostOptions::preference`] on.
pub const PREFERENCES: u32 = 20;
/// The least number of bits for servers' marks: of as many servers as have route tables.
const SERVER_MARK_BITS: u32 = BALANCER_TABLES.ilog2();
/// The most queues of a device.
pub const MAX_QUEUES: usize = 64;
/// The experiment identifier (`ExID`) of the redirect option (RFC 6994, PROTOCOL.md) unless configured.
pub const DEFAULT_EXID: u16 = 0x5244;

/// The `[host]` table of a file as written: everything may be left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostSettings {
    exid: Option<u16>,
    mark: Option<Spanned<u32>>,
    mark_mask: Option<Spanned<u32>>,
    table: Option<Spanned<u32>>,
    preference: Option<Spanned<u32>>,
    device: Option<Spanned<String>>,
    super_packets: Option<bool>,
    offload: Option<Spanned<OffloadSetting>>,
    server_mark_mask: Option<Spanned<u32>>,
    queues: Option<Spanned<usize>>,
    pin: Option<Spanned<bool>>,
}

/// `offload` as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum OffloadSetting {
    Auto,
    Routed,
    Off,
}

/// Numbers and names a daemon uses on its host. The defaults of the roles differ, so that one of each can live on
/// one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostOptions {
    /// Whose daemon it is.
    pub role: Role,
    /// The experiment identifier (`ExID`) of the redirect option (RFC 6994).
    pub exid: u16,
    /// The mark of packets to divert; all its bits are in `mark_mask`, and it is not 0.
    pub mark: u32,
    /// The bits of a packet's mark that are ours; the others are left alone.
    pub mark_mask: u32,
    /// The bits of a packet's mark that say to which server a balancer forwards it, where packets stay as they are.
    pub server_mark_mask: u32,
    /// The first of the route tables ([`HostOptions::tables`]).
    pub table: u32,
    /// The first of [`PREFERENCES`] rule preferences, all before `lookup local` (moved to 100).
    pub preference: u32,
    /// The TUN device's name; with several, a number is appended.
    pub device: String,
    /// Whether packets of up to 64 KiB pass the device in one piece.
    pub super_packets: bool,
    /// Whether the kernel does by itself what it can: a balancer's forwards ([`offload`](crate::offload)), a client's
    /// exchanges ports ([`swaps`](crate::swaps)); a server's does nothing.
    pub offload: bool,
    /// Whether what the kernel forwards for a balancer is handed on where it arrives, if nothing else has a say in it
    /// ([`shortcuts`](crate::shortcuts)), or always routed.
    pub shortcuts: bool,
    /// Queues of the device, each with a thread, at most [`MAX_QUEUES`]; a client's and a server's have one.
    pub queues: usize,
    /// Whether each thread stays on a processor of its own.
    pub pin: bool,
}

impl HostOptions {
    /// What a role uses unless its file says otherwise.
    pub fn defaults(role: Role) -> Self {
        let (mark, table, preference, device) = match role {
            Role::Balancer => (0x3000_0000, 21_600, 50, "shunt-lb0"),
            Role::Client => (0x1000_0000, 21_000, 10, "shunt0"),
            Role::Server => (0x2000_0000, 21_300, 30, "shunt-srv0"),
        };
        Self {
            role,
            exid: DEFAULT_EXID,
            mark,
            mark_mask: 0x3000_0000,
            server_mark_mask: 0x03ff_0000,
            table,
            preference,
            device: device.to_owned(),
            super_packets: true,
            offload: role != Role::Server,
            shortcuts: role == Role::Balancer,
            queues: 1,
            pin: false,
        }
    }

    /// The route tables that are ours.
    pub fn tables(&self) -> std::ops::Range<u32> {
        self.table..self.table.saturating_add(tables_of(self.role))
    }

    /// The mark of what is forwarded to the server with this number; `None` if the bits do not suffice.
    pub fn server_mark(&self, number: u32) -> Option<u32> {
        let shift = self.server_mark_mask.trailing_zeros();
        let mark = number.checked_add(1)?.checked_shl(shift)?;
        (mark >> shift == number + 1 && mark & !self.server_mark_mask == 0).then_some(mark)
    }

    /// The rule preferences that are ours.
    pub fn preferences(&self) -> std::ops::Range<u32> {
        self.preference..self.preference.saturating_add(PREFERENCES)
    }

    /// The number that names this role as the origin of rules and routes (`ip route ... proto N`).
    pub const fn protocol(&self) -> u8 {
        match self.role {
            Role::Balancer => 83,
            Role::Client => 84,
            Role::Server => 85,
        }
    }
}

impl HostSettings {
    /// The settings with a role's defaults filled in.
    ///
    /// # Errors
    /// A number out of its range, or a name that no interface can have; the line is named.
    pub fn resolve(&self, role: Role, source: &Source) -> Result<HostOptions, ConfigError> {
        let mut options = HostOptions::defaults(role);
        options.exid = self.exid.unwrap_or(options.exid);
        options.super_packets = self.super_packets.unwrap_or(options.super_packets);
        self.resolve_mark(source, &mut options)?;
        if let Some(table) = &self.table {
            options.table = *table.get_ref();
            let reserved = 253..=255;
            if options.table == 0
                || options.table > u32::MAX - tables_of(role)
                || reserved.into_iter().any(|number| options.tables().contains(&number))
            {
                return Err(source.error_at(
                    table.span(),
                    format!(
                        "the {} route tables from here on must not include 0, 253 to 255 (the system's)",
                        tables_of(role)
                    ),
                ));
            }
        }
        if let Some(preference) = &self.preference {
            options.preference = *preference.get_ref();
            let last = LOCAL_PREFERENCE - PREFERENCES;
            if !(1..=last).contains(&options.preference) {
                return Err(source.error_at(
                    preference.span(),
                    format!("the first rule preference must be between 1 and {last}"),
                ));
            }
        }
        if let Some(device) = &self.device {
            options.device.clone_from(device.get_ref());
            check_device(&options.device).map_err(|why| source.error_at(device.span(), why))?;
        }
        if let Some(offload) = &self.offload {
            if role == Role::Server {
                let message = "an agent sees handshakes only: nothing of it can be left to the kernel";
                return Err(source.error_at(offload.span(), message));
            }
            if role != Role::Balancer && *offload.get_ref() == OffloadSetting::Routed {
                let message = "only what a balancer forwards can be routed or not";
                return Err(source.error_at(offload.span(), message));
            }
            options.offload = *offload.get_ref() != OffloadSetting::Off;
            options.shortcuts = role == Role::Balancer && *offload.get_ref() == OffloadSetting::Auto;
        }
        self.resolve_server_marks(role, source, &mut options)?;
        self.resolve_queues(role, source, &mut options)?;
        Ok(options)
    }

    fn resolve_server_marks(
        &self,
        role: Role,
        source: &Source,
        options: &mut HostOptions,
    ) -> Result<(), ConfigError> {
        let own = self.server_mark_mask.as_ref();
        let span = own.map(Spanned::span);
        let span = span.or_else(|| self.mark_mask.as_ref().or(self.mark.as_ref()).map(Spanned::span));
        let Some(span) = span.filter(|_| own.is_some() || role == Role::Balancer) else { return Ok(()) };
        options.server_mark_mask = own.map_or(options.server_mark_mask, |mask| *mask.get_ref());
        let bits = options.server_mark_mask;
        let run = bits >> bits.trailing_zeros().min(31);
        let message = if role != Role::Balancer {
            "only a balancer forwards to servers".to_owned()
        } else if run & run.wrapping_add(1) != 0 || bits.count_ones() < SERVER_MARK_BITS {
            format!("server_mark_mask has to be one run of at least {SERVER_MARK_BITS} bits")
        } else if bits & options.mark_mask != 0 {
            format!("server_mark_mask {bits:#x} has bits of mark_mask {:#x}", options.mark_mask)
        } else {
            return Ok(());
        };
        Err(source.error_at(span, message))
    }

    fn resolve_queues(
        &self,
        role: Role,
        source: &Source,
        options: &mut HostOptions,
    ) -> Result<(), ConfigError> {
        let spans = (self.queues.as_ref().map(Spanned::span), self.pin.as_ref().map(Spanned::span));
        if let (Some(span), _) | (_, Some(span)) = spans
            && role != Role::Balancer
        {
            return Err(
                source.error_at(span, "only a balancer has several queues: what it decides needs no memory")
            );
        }
        if let Some(queues) = &self.queues {
            options.queues = *queues.get_ref();
            if !(1..=MAX_QUEUES).contains(&options.queues) {
                return Err(source.error_at(
                    queues.span(),
                    format!("a device has 1 to {MAX_QUEUES} queues; one a processor is what may help"),
                ));
            }
        }
        options.pin = self.pin.as_ref().is_some_and(|pin| *pin.get_ref());
        Ok(())
    }

    fn resolve_mark(&self, source: &Source, options: &mut HostOptions) -> Result<(), ConfigError> {
        let Some(span) = self.mark.as_ref().or(self.mark_mask.as_ref()).map(Spanned::span) else {
            return Ok(());
        };
        options.mark = self.mark.as_ref().map_or(options.mark, |mark| *mark.get_ref());
        options.mark_mask = match (&self.mark_mask, &self.mark) {
            (Some(mask), _) => *mask.get_ref(),
            // A mark alone owns its own bits.
            (None, Some(mark)) => *mark.get_ref(),
            (None, None) => options.mark_mask,
        };
        if options.mark == 0 {
            return Err(source.error_at(span, "mark 0 is what unmarked packets have"));
        }
        if options.mark & !options.mark_mask != 0 {
            return Err(source.error_at(
                span,
                format!("mark {:#x} has bits outside of mark_mask {:#x}", options.mark, options.mark_mask),
            ));
        }
        Ok(())
    }
}

const fn tables_of(role: Role) -> u32 {
    match role {
        Role::Balancer => BALANCER_TABLES,
        Role::Client | Role::Server => TABLES,
    }
}

fn check_device(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if name.is_empty() || name.len() > 15 || !name.chars().all(good) {
        return Err(format!(
            "{name:?} cannot be an interface's name: 1 to 15 letters, digits, hyphens and underscores"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        #[serde(default)]
        host: HostSettings,
    }

    fn options(text: &str) -> Result<HostOptions, ConfigError> {
        let source = Source::new("server.toml", text);
        source.parse::<File>()?.host.resolve(Role::Server, &source)
    }

    #[test]
    fn defaults_of_the_roles_do_not_collide() {
        let all = Role::ALL.map(HostOptions::defaults);
        for (i, one) in all.iter().enumerate() {
            assert_eq!(one.mark & !one.mark_mask, 0);
            assert!(one.preferences().end <= LOCAL_PREFERENCE);
            check_device(&one.device).unwrap();
            for other in &all[i + 1..] {
                assert!(one.tables().all(|table| !other.tables().contains(&table)));
                assert!(one.preferences().all(|preference| !other.preferences().contains(&preference)));
                assert_ne!(one.mark, other.mark);
                assert_ne!(one.device, other.device);
                assert_ne!(one.protocol(), other.protocol());
            }
        }
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        assert_eq!(options("").unwrap(), HostOptions::defaults(Role::Server));
    }

    #[test]
    fn settings_override_defaults() {
        let got =
            options("[host]\nexid = 0x1234\nmark = 0x40\ntable = 90\npreference = 5\ndevice = \"t0\"\n");
        // 90 to 345 would hold 253.
        assert_eq!(got.unwrap_err().line(), Some(4));
        let got =
            options("[host]\nexid = 0x1234\nmark = 0x40\ntable = 900\npreference = 5\ndevice = \"t0\"\nsuper_packets = false\n")
                .unwrap();
        assert_eq!((got.exid, got.mark, got.mark_mask, got.table), (0x1234, 0x40, 0x40, 900));
        assert_eq!((got.preference, got.device.as_str(), got.super_packets), (5, "t0", false));
    }

    #[test]
    fn mistakes_are_refused_with_their_line() {
        for (line, message) in [
            ("mark = 0", "mark 0"),
            ("mark = 3\nmark_mask = 1", "outside"),
            ("mark_mask = 1", "outside"),
            ("preference = 0", "between"),
            ("preference = 81", "between"),
            ("table = 0", "253"),
            ("device = \"a b\"", "interface's name"),
            ("device = \"sixteen-letters-\"", "interface's name"),
            ("exid = 70000", "invalid value"),
            ("super_packets = 1", "invalid type"),
            ("queues = 2", "only a balancer has several queues"),
            ("pin = true", "only a balancer has several queues"),
            ("server_mark_mask = 0x3ff", "only a balancer forwards"),
            ("mask = 1", "unknown field"),
            ("offload = \"auto\"", "handshakes only"),
            ("offload = true", "wanted string"),
        ] {
            let error = options(&format!("[host]\n{line}\n")).unwrap_err();
            assert_eq!(error.line(), Some(2), "{error}");
            assert!(error.message().contains(message), "{error}");
        }
    }
}
