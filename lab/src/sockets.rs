//! The TCP sockets of a host, as its kernel lists them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::{Error, Host, Result};

/// The state of a TCP connection (RFC 9293 §3.3.2), as Linux numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names are the standard's")]
pub enum TcpState {
    Established = 1,
    SynSent,
    SynReceived,
    FinWait1,
    FinWait2,
    TimeWait,
    Closed,
    CloseWait,
    LastAck,
    Listen,
    Closing,
}

/// One TCP socket of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    /// Its own address and port.
    pub local: SocketAddr,
    /// The other end's; unspecified for a listener.
    pub remote: SocketAddr,
    /// Where the connection stands. Half-open ones (SYN queue) are listed as [`TcpState::SynReceived`].
    pub state: TcpState,
}

impl Host {
    /// Every TCP socket of this host in both families, TIME-WAIT and half-open ones too.
    ///
    /// # Errors
    /// The kernel's list cannot be read, or the lab is gone.
    pub fn tcp_sockets(&self) -> Result<Vec<TcpSocket>> {
        let name = self.name().to_owned();
        self.call(move |_| {
            let mut sockets = Vec::new();
            for file in ["tcp", "tcp6"] {
                // The thread's own view: the process as a whole is in another namespace.
                let path = format!("/proc/thread-self/net/{file}");
                match std::fs::read_to_string(&path) {
                    Ok(text) => sockets.extend(text.lines().skip(1).filter_map(parse_line)),
                    Err(error) if file == "tcp6" && error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(Error::io(&name, format!("reading {path}"))(error)),
                }
            }
            Ok(sockets)
        })
    }

    /// How many TCP sockets of this host are in `state`.
    ///
    /// # Errors
    /// As [`tcp_sockets`](Self::tcp_sockets).
    pub fn tcp_count(&self, state: TcpState) -> Result<usize> {
        Ok(self.tcp_sockets()?.iter().filter(|socket| socket.state == state).count())
    }
}

fn parse_line(line: &str) -> Option<TcpSocket> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let local = parse_address(fields.next()?)?;
    let remote = parse_address(fields.next()?)?;
    let state = match u8::from_str_radix(fields.next()?, 16).ok()? {
        1 => TcpState::Established,
        2 => TcpState::SynSent,
        3 | 12 => TcpState::SynReceived,
        4 => TcpState::FinWait1,
        5 => TcpState::FinWait2,
        6 => TcpState::TimeWait,
        7 => TcpState::Closed,
        8 => TcpState::CloseWait,
        9 => TcpState::LastAck,
        10 => TcpState::Listen,
        11 => TcpState::Closing,
        _ => return None,
    };
    Some(TcpSocket { local, remote, state })
}

/// `0100007F:1F90`: 32-bit words as the machine reads them from memory in network order, then the port.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = [0; 16];
    if !address.is_ascii() || address.len() % 8 != 0 || address.len() > 32 {
        return None;
    }
    for (word, place) in address.as_bytes().chunks(8).zip(bytes.chunks_mut(4)) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        place.copy_from_slice(&word.to_ne_bytes());
    }
    let address: IpAddr = match address.len() {
        8 => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(),
        32 => Ipv6Addr::from(bytes).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
}

#[cfg(test)]
#[cfg(target_endian = "little")]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_kernels_list_is_read() {
        let line = "   0: 0100007F:1F90 0200000A:C350 01 00000000:00000000 00:00000000 00000000     0";
        let socket = parse_line(line).unwrap();
        assert_eq!(socket.local, "127.0.0.1:8080".parse().unwrap());
        assert_eq!(socket.remote, "10.0.0.2:50000".parse().unwrap());
        assert_eq!(socket.state, TcpState::Established);
        let line = "   0: B80D0120000000000000000001000000:01BB 00000000000000000000000000000000:0000 0A 0";
        let socket = parse_line(line).unwrap();
        assert_eq!(socket.local, "[2001:db8::1]:443".parse().unwrap());
        assert_eq!(socket.state, TcpState::Listen);
    }

    #[test]
    fn nonsense_is_passed_over() {
        for line in ["", "x", "0: 0100007F 0 01", "0: 0100007F:1F90 0200000A:C350 FF", "0: é00007F:1 0:0 01"]
        {
            assert_eq!(parse_line(line), None, "{line}");
        }
    }
}
