//! Writing what a replay would have sent, each packet with the decision behind it.

use std::borrow::Cow;
use std::io::{self, Write};

use pcap_file::DataLink;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption, InterfaceTsResolution,
};
use pcap_file::pcapng::blocks::opt_common::CommonOption;
use pcap_file::pcapng::{PcapNgBlock, PcapNgWriteError, PcapNgWriter};

use crate::row::Row;

/// Interfaces of the file, which are the places that packets were sent to; more share the last.
const MAX_INTERFACES: usize = 1024;

/// A pcapng file of packets that a replay has sent.
pub struct SentWriter<W: Write> {
    out: PcapNgWriter<W>,
    interfaces: Vec<String>,
}

impl<W: Write> SentWriter<W> {
    /// Begins the file.
    ///
    /// # Errors
    /// It cannot be written to.
    pub fn new(out: W) -> io::Result<SentWriter<W>> {
        Ok(SentWriter { out: PcapNgWriter::new(out).map_err(wrap)?, interfaces: Vec::new() })
    }

    /// Writes what was sent for one packet of the capture, or by one timer.
    ///
    /// # Errors
    /// The file cannot be written to.
    pub fn row(&mut self, row: &Row) -> io::Result<()> {
        let from = match row.number {
            Some(number) => format!("packet {number}"),
            None => "timer".to_owned(),
        };
        let comment = match &row.decision {
            Some(decision) => format!("{from}: {decision}"),
            None => from,
        };
        for sent in &row.sent {
            let interface_id = self.interface(&sent.towards).map_err(wrap)?;
            let block = EnhancedPacketBlock {
                interface_id,
                timestamp: row.at,
                original_len: u32::try_from(sent.packet.len()).unwrap_or(u32::MAX),
                data: Cow::Borrowed(sent.packet.bytes()),
                options: vec![EnhancedPacketOption::Common(CommonOption::Comment(Cow::Borrowed(&comment)))],
            };
            self.out.write_block(&block.into_block()).map_err(wrap)?;
        }
        Ok(())
    }

    /// Writes out what is still in memory.
    ///
    /// # Errors
    /// The file cannot be written to.
    pub fn finish(mut self) -> io::Result<()> {
        self.out.get_mut().flush()
    }

    fn interface(&mut self, towards: &str) -> Result<u32, PcapNgWriteError> {
        let known = self.interfaces.iter().position(|name| name == towards);
        let full = (self.interfaces.len() == MAX_INTERFACES).then_some(MAX_INTERFACES - 1);
        if let Some(index) = known.or(full) {
            return Ok(index as u32);
        }
        let block = InterfaceDescriptionBlock {
            linktype: DataLink::RAW,
            snaplen: 0,
            options: vec![
                InterfaceDescriptionOption::IfName(Cow::Borrowed(towards)),
                InterfaceDescriptionOption::IfTsResol(InterfaceTsResolution::NANO),
            ],
        };
        self.out.write_block(&block.into_block())?;
        self.interfaces.push(towards.to_owned());
        Ok(self.interfaces.len() as u32 - 1)
    }
}

fn wrap(error: PcapNgWriteError) -> io::Error {
    match error {
        PcapNgWriteError::Io(error) => error,
        other => io::Error::other(other),
    }
}
