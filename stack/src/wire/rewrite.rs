//! Changing a packet in place. Checksums follow by RFC 1624, so one that was wrong stays wrong; partial checksums
//! (virtio) follow addresses and length only.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;

use super::checksum::Sum;
use super::icmp::Quoted;
use super::ip::{Protocol, Version, be16};
use super::option::{MAX_LEN as OPTION_MAX_LEN, RedirectOption};
use super::packet::Packet;
use super::tcp;
use super::tcp_option::{TcpOption, TcpOptions};
use super::vnet::TCP_CHECKSUM;

/// The option does not fit into the segment (`W2`, `W3`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[error("no room for {need} bytes of option, {have} free")]
pub struct NoRoom {
    /// Bytes needed.
    pub need: usize,
    /// Bytes free.
    pub have: usize,
}

/// A host's addresses, at most one a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostAddresses {
    /// IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl HostAddresses {
    /// The address of the family of `like`.
    pub fn like(&self, like: IpAddr) -> Option<IpAddr> {
        if like.is_ipv4() { self.v4.map(IpAddr::V4) } else { self.v6.map(IpAddr::V6) }
    }
}

impl Packet {
    #[inline]
    fn put(&mut self, at: usize, bytes: &[u8]) -> Sum {
        let place = &mut self.buffer[at..at + bytes.len()];
        let change = Sum::new().remove(place).add(bytes);
        place.copy_from_slice(bytes);
        change
    }

    #[inline]
    fn patch_word(&mut self, at: usize, update: impl FnOnce(u16) -> u16) {
        let word = &mut self.buffer[at..][..2];
        let value = update(be16(word, 0));
        word.copy_from_slice(&value.to_be_bytes());
    }

    /// Follows a change of the pseudo-header (`pseudo`) and of the bytes covered (`covered`).
    #[inline]
    fn follow(&mut self, pseudo: Sum, covered: Sum) {
        // Nearly all is so, and needs nothing of the rest.
        if self.layout.segment && !self.offload.partial_checksum {
            let field = self.layout.transport + TCP_CHECKSUM;
            self.patch_word(field, |checksum| pseudo.merge(covered).update(checksum));
        } else {
            self.follow_other(pseudo, covered);
        }
    }

    #[inline(never)]
    fn follow_other(&mut self, pseudo: Sum, covered: Sum) {
        let Some(field) = self.checksum_offset() else { return };
        if self.offload.partial_checksum {
            self.patch_word(field, |partial| pseudo.update_partial(partial));
            return;
        }
        let udp = self.layout.protocol == Protocol::Udp;
        if udp && be16(&self.buffer, field) == 0 {
            return;
        }
        let covers_addresses = self.layout.protocol != Protocol::Icmp;
        let change = if covers_addresses { pseudo.merge(covered) } else { covered };
        self.patch_word(field, |checksum| match change.update(checksum) {
            0 if udp => 0xffff,
            updated => updated,
        });
    }

    #[inline]
    fn put_address(&mut self, source: bool, address: IpAddr) {
        assert_eq!(address.is_ipv4(), self.layout.version == Version::V4, "address family");
        match address {
            IpAddr::V4(address) if source => self.put_v4::<12>(address),
            IpAddr::V4(address) => self.put_v4::<16>(address),
            IpAddr::V6(address) if source => self.put_v6::<8>(address),
            IpAddr::V6(address) => self.put_v6::<24>(address),
        }
    }

    #[inline]
    fn put_v4<const AT: usize>(&mut self, address: Ipv4Addr) {
        let change = self.put(AT, &address.octets()).folded();
        self.patch_word(10, |checksum| change.update(checksum));
        self.follow(change, Sum::new());
    }

    #[inline]
    fn put_v6<const AT: usize>(&mut self, address: Ipv6Addr) {
        let change = self.put(AT, &address.octets());
        self.follow(change, Sum::new());
    }

    /// Rewrites the source address.
    ///
    /// # Panics
    /// If `address` is of the other family: configuration keeps families apart.
    #[inline]
    pub fn set_source(&mut self, address: IpAddr) {
        self.put_address(true, address);
    }

    /// Rewrites the destination address.
    ///
    /// # Panics
    /// If `address` is of the other family: configuration keeps families apart.
    #[inline]
    pub fn set_destination(&mut self, address: IpAddr) {
        self.put_address(false, address);
    }

    /// Rewrites the destination address by a host's of the packet's own family; says whether it has one.
    #[inline]
    pub fn set_destination_host(&mut self, host: &HostAddresses) -> bool {
        match self.layout.version {
            Version::V4 => match &host.v4 {
                Some(address) => self.put_v4::<16>(*address),
                None => return false,
            },
            Version::V6 => return self.set_destination_v6(host),
        }
        true
    }

    /// Apart, so that the rest is small enough to stand where it is called.
    #[inline(never)]
    fn set_destination_v6(&mut self, host: &HostAddresses) -> bool {
        host.v6.map(|address| self.put_v6::<24>(address)).is_some()
    }

    /// Rewrites the differentiated services code point (RFC 2474), of which only the low 6 bits count; the ECN bits
    /// (RFC 3168) stay.
    pub fn set_dscp(&mut self, dscp: u8) {
        let class = u16::from(dscp & 0x3f);
        let word = be16(&self.buffer, 0);
        match self.layout.version {
            Version::V4 => {
                let change = self.put(0, &(word & 0xff03 | class << 2).to_be_bytes());
                self.patch_word(10, |checksum| change.update(checksum));
            }
            // The traffic class lies between version and flow label; no checksum covers it.
            Version::V6 => {
                self.put(0, &(word & 0xf03f | class << 6).to_be_bytes());
            }
        }
    }

    /// Rewrites the ECN bits (RFC 3168), of which only the low 2 bits count; the DSCP stays.
    pub fn set_ecn(&mut self, ecn: u8) {
        let bits = u16::from(ecn & 3);
        let word = be16(&self.buffer, 0);
        match self.layout.version {
            Version::V4 => {
                let change = self.put(0, &(word & 0xfffc | bits).to_be_bytes());
                self.patch_word(10, |checksum| change.update(checksum));
            }
            Version::V6 => {
                self.put(0, &(word & 0xffcf | bits << 4).to_be_bytes());
            }
        }
    }

    #[inline]
    fn put_port(&mut self, offset: usize, port: u16) {
        if self.ports().is_some() {
            let change = self.put(self.layout.transport + offset, &port.to_be_bytes());
            self.follow(Sum::new(), change);
        }
    }

    /// Rewrites the source port of TCP or UDP; nothing happens if there is none.
    #[inline]
    pub fn set_source_port(&mut self, port: u16) {
        self.put_port(0, port);
    }

    /// Rewrites the destination port of TCP or UDP; nothing happens if there is none.
    #[inline]
    pub fn set_destination_port(&mut self, port: u16) {
        self.put_port(2, port);
    }

    /// Option bytes that a TCP segment has free, `W2`; 0 if it is a super-packet (`W3`) or not TCP.
    pub fn option_room(&self) -> usize {
        match self.tcp() {
            Some(tcp) if self.offload.gso.is_none() && self.layout.fragment.is_none() => {
                tcp::MAX_LEN - tcp.header_len()
            }
            _ => 0,
        }
    }

    /// Inserts the option in front of the others (`W4`), in a segment that stays within `mtu` bytes (`W3`).
    ///
    /// # Errors
    /// [`NoRoom`]; the packet is unchanged.
    pub fn insert_redirect(&mut self, exid: u16, option: &RedirectOption, mtu: usize) -> Result<(), NoRoom> {
        let need = option.padded_len();
        let have = self.option_room().min(mtu.min(65_535).saturating_sub(self.len()));
        if need > have {
            return Err(NoRoom { need, have });
        }
        let mut bytes = [0; OPTION_MAX_LEN + 2];
        let used = option.emit(exid, &mut bytes);
        self.splice_options(0, 0, &bytes[..used]);
        Ok(())
    }

    /// Inserts as much of the option as fits: without the token first, or without the observed digest where
    /// `token_required`, then without the other, then nothing (`W2`).
    ///
    /// # Errors
    /// [`NoRoom`] if not even the fixed part fits; the packet is unchanged.
    pub fn insert_redirect_fitting(
        &mut self,
        exid: u16,
        option: &RedirectOption,
        token_required: bool,
        mtu: usize,
    ) -> Result<(), NoRoom> {
        let mut smaller = *option;
        let mut result = self.insert_redirect(exid, &smaller, mtu);
        for drop_token in [!token_required, token_required] {
            if result.is_ok() {
                break;
            }
            if drop_token {
                smaller.token = None;
            } else {
                smaller.observed = None;
            }
            result = self.insert_redirect(exid, &smaller, mtu);
        }
        result
    }

    /// Removes every option under `exid`, with the no-operation bytes that padded it; says whether there was one.
    pub fn strip_redirect(&mut self, exid: u16) -> bool {
        let mut found = false;
        while let Some((at, length)) = self.find_redirect(exid) {
            self.splice_options(at, length, &[]);
            found = true;
        }
        found
    }

    /// Offset in the option bytes and length of the option with its padding; both such that the rest stays aligned.
    fn find_redirect(&self, exid: u16) -> Option<(usize, usize)> {
        if self.layout.fragment.is_some() || self.offload.gso.is_some() {
            return None;
        }
        let tcp = self.tcp()?;
        let mut options: TcpOptions<'_> = tcp.options();
        // No-operations in a row: bytes of value 1 may as well be the end of another option.
        let mut filler = 0;
        loop {
            let at = options.offset();
            match options.next()? {
                Ok(TcpOption::Experiment { exid: id, bytes }) if id == exid => {
                    let padding = bytes.len().next_multiple_of(4) - bytes.len();
                    let padding = if filler >= padding { padding } else { 0 };
                    return Some((at - padding, bytes.len() + padding));
                }
                Ok(TcpOption::NoOperation) => filler += 1,
                Ok(_) => filler = 0,
                Err(_) => return None,
            }
        }
    }

    /// Removes TCP fast-open options (kind 34), however many, replacing them by no-operations (`C1`).
    pub fn blank_fast_open(&mut self) {
        while let Some(range) = self.find_fast_open() {
            self.overwrite_options(range.start, &[1; tcp::MAX_LEN][..range.len()]);
        }
    }

    /// Where the first fast-open option stands among the options.
    fn find_fast_open(&self) -> Option<Range<usize>> {
        let tcp = self.tcp()?;
        let mut options = tcp.options();
        loop {
            let at = options.offset();
            if let TcpOption::FastOpen(_) = options.next()?.ok()? {
                return Some(at..options.offset());
            }
        }
    }

    /// Overwrites bytes of the options at `at`, keeping the checksum.
    fn overwrite_options(&mut self, at: usize, bytes: &[u8]) {
        let mut block = [0; tcp::MAX_LEN - tcp::FIXED_LEN];
        let start = self.layout.transport + tcp::FIXED_LEN;
        let Some(tcp) = self.tcp() else { return };
        let old = tcp.option_bytes();
        let length = old.len();
        block[..length].copy_from_slice(old);
        block[at..at + bytes.len()].copy_from_slice(bytes);
        let change = self.put(start, &block[..length]);
        self.follow(Sum::new(), change);
    }

    /// Replaces `removed` option bytes at `at` by `bytes`; what is left over up to a multiple of 4 becomes padding.
    fn splice_options(&mut self, at: usize, removed: usize, bytes: &[u8]) {
        let Some(tcp) = self.tcp() else { return };
        let old = tcp.option_bytes();
        let mut block = [1u8; tcp::MAX_LEN - tcp::FIXED_LEN];
        let used = at + bytes.len() + (old.len() - at - removed);
        block[..at].copy_from_slice(&old[..at]);
        block[at..at + bytes.len()].copy_from_slice(bytes);
        block[at + bytes.len()..used].copy_from_slice(&old[at + removed..]);
        let (old_len, new_len) = (old.len(), used.next_multiple_of(4));
        // Padding behind an end-of-options byte is never read; without one it is no-operations.
        let start = self.layout.transport + tcp::FIXED_LEN;
        let offset_at = self.layout.transport + 12;
        let old_length = self.buffer.len() - self.layout.transport;
        let mut covered = Sum::new().remove(old).add(&block[..new_len]);

        self.resize_at(start + old_len, new_len.cast_signed() - old_len.cast_signed());
        self.buffer[start..start + new_len].copy_from_slice(&block[..new_len]);
        let header_words = ((tcp::FIXED_LEN + new_len) / 4) as u8;
        let offset = [header_words << 4 | self.buffer[offset_at] & 0x0f, self.buffer[offset_at + 1]];
        covered = covered.merge(self.put(offset_at, &offset));
        self.set_total_len();
        let length = |value: usize| u32::try_from(value).unwrap_or(u32::MAX).to_be_bytes();
        let new_length = self.buffer.len() - self.layout.transport;
        let pseudo = Sum::new().remove(&length(old_length)).add(&length(new_length));
        self.follow(pseudo, covered);
    }

    /// Inserts or removes `by` bytes at `at` (removal takes the bytes before `at`).
    fn resize_at(&mut self, at: usize, by: isize) {
        let old = self.buffer.len();
        let new = old.saturating_add_signed(by);
        if by > 0 {
            self.buffer.resize(new, 0);
        }
        self.buffer.copy_within(at..old, at.saturating_add_signed(by));
        self.buffer.truncate(new);
        self.layout.total = new;
    }

    fn set_total_len(&mut self) {
        match self.layout.version {
            Version::V4 => {
                let change = self.put(2, &(self.layout.total as u16).to_be_bytes());
                self.patch_word(10, |checksum| change.update(checksum));
            }
            Version::V6 => {
                self.put(4, &((self.layout.total - super::ip::IPV6_LEN) as u16).to_be_bytes());
            }
        }
    }

    /// Rewrites the source of the packet that an ICMP error quotes (`I2`, `I5`); says whether there was one.
    pub fn set_quoted_source(&mut self, socket: SocketAddr) -> bool {
        self.set_quoted(true, socket)
    }

    /// Rewrites the destination of the packet that an ICMP error quotes (`I2`); says whether there was one.
    pub fn set_quoted_destination(&mut self, socket: SocketAddr) -> bool {
        self.set_quoted(false, socket)
    }

    fn set_quoted(&mut self, source: bool, socket: SocketAddr) -> bool {
        let Some(quoted) = self.icmp().and_then(|icmp| icmp.quoted()) else { return false };
        if (quoted.version == Version::V4) != socket.is_ipv4() {
            return false;
        }
        let base = self.layout.transport;
        let port_at = base + quoted.transport + if source { 0 } else { 2 };
        let port = self.put(port_at, &socket.port().to_be_bytes());
        let mut covered = port;
        let address_at = base + quoted.network + address_offset(quoted.version, source);
        let address = match socket.ip() {
            IpAddr::V4(address) => self.put(address_at, &address.octets()),
            IpAddr::V6(address) => self.put(address_at, &address.octets()),
        };
        covered = covered.merge(address);
        if quoted.version == Version::V4 {
            let field = base + quoted.network + 10;
            covered = covered.merge(self.update_word(field, address));
        }
        if let Some(field) = self.quoted_checksum(&quoted) {
            covered = covered.merge(self.update_word(field, address.merge(port)));
        }
        self.follow(Sum::new(), covered);
        true
    }

    /// Offset of the quoted transport checksum, if the quote reaches it and it is in use.
    fn quoted_checksum(&self, quoted: &Quoted) -> Option<usize> {
        let offset = if quoted.protocol == Protocol::Tcp { 16 } else { 6 };
        let field = self.layout.transport + quoted.transport + offset;
        let reached = field + 2 <= self.buffer.len();
        let unused = reached && quoted.protocol == Protocol::Udp && be16(&self.buffer, field) == 0;
        (reached && !unused).then_some(field)
    }

    fn update_word(&mut self, field: usize, change: Sum) -> Sum {
        let value = change.update(be16(&self.buffer, field));
        self.put(field, &value.to_be_bytes())
    }
}

/// Offset of the source or destination address in an IP header.
#[inline]
fn address_offset(version: Version, source: bool) -> usize {
    match (version, source) {
        (Version::V4, true) => 12,
        (Version::V4, false) => 16,
        (Version::V6, true) => 8,
        (Version::V6, false) => 24,
    }
}
