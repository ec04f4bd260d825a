//! Captures written in every format that is read.

use std::borrow::Cow;
use std::time::Duration;

use pcap_file::DataLink;
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption, InterfaceTsResolution,
};
use pcap_file::pcapng::blocks::opt_common::CommonOption;
use pcap_file::pcapng::blocks::section_header::{SectionHeaderBlock, SectionHeaderOption};
use pcap_file::pcapng::{PcapNgBlock, PcapNgWriter};
use pcap_file::{Endianness, pcap::PcapTsResolution};
use shunt_stack::device::Direction;
use shunt_stack::wire::Packet;

/// A file's format and link layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// pcap of IP packets, times in nanoseconds, big-endian.
    PcapRaw,
    /// pcap of Ethernet frames, times in microseconds.
    PcapEthernet,
    /// pcap of what Linux captures on `any`.
    PcapSll,
    /// pcap of what BSD captures on its loopback.
    PcapNull,
    /// pcapng of IP packets with their directions, as daemons write it.
    NgRaw,
    /// pcapng of Ethernet frames.
    NgEthernet,
    /// pcapng of Ethernet frames with a VLAN tag.
    NgVlan,
    /// pcapng of what newer Linux captures on `any`.
    NgSll2,
}

/// A packet to be written.
pub(crate) struct Entry<'a> {
    pub(crate) at: Duration,
    pub(crate) direction: Direction,
    pub(crate) packet: &'a Packet,
}

const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

impl Format {
    pub(crate) fn extension(self) -> &'static str {
        match self {
            Format::PcapRaw | Format::PcapEthernet | Format::PcapSll | Format::PcapNull => "pcap",
            Format::NgRaw | Format::NgEthernet | Format::NgVlan | Format::NgSll2 => "pcapng",
        }
    }

    /// What it is, in words.
    pub(crate) fn about(self) -> &'static str {
        match self {
            Format::PcapRaw => "pcap, raw IP, nanoseconds, big-endian",
            Format::PcapEthernet => "pcap, Ethernet",
            Format::PcapSll => "pcap, Linux cooked",
            Format::PcapNull => "pcap, BSD loopback",
            Format::NgRaw => "pcapng, raw IP, with directions",
            Format::NgEthernet => "pcapng, Ethernet",
            Format::NgVlan => "pcapng, Ethernet with a VLAN tag",
            Format::NgSll2 => "pcapng, Linux cooked v2",
        }
    }

    fn link(self) -> DataLink {
        match self {
            Format::PcapRaw | Format::NgRaw => DataLink::RAW,
            Format::PcapEthernet | Format::NgEthernet | Format::NgVlan => DataLink::ETHERNET,
            Format::PcapSll => DataLink::LINUX_SLL,
            Format::NgSll2 => DataLink::LINUX_SLL2,
            Format::PcapNull => DataLink::NULL,
        }
    }

    /// What stands in front of the packet.
    fn header(self, entry: &Entry<'_>) -> Vec<u8> {
        let v4 = entry.packet.source().is_ipv4();
        let ether_type: [u8; 2] = if v4 { [0x08, 0x00] } else { [0x86, 0xdd] };
        let outgoing = entry.direction == Direction::Out;
        let (from, to) = if outgoing { (CLIENT_MAC, ROUTER_MAC) } else { (ROUTER_MAC, CLIENT_MAC) };
        // Linux cooked: to us, or sent by us.
        let kind = if outgoing { 4 } else { 0 };
        match self {
            Format::PcapRaw | Format::NgRaw => Vec::new(),
            Format::PcapEthernet | Format::NgEthernet => [&to[..], &from, &ether_type].concat(),
            Format::NgVlan => [&to[..], &from, &[0x81, 0x00, 0x00, 0x07], &ether_type].concat(),
            Format::PcapSll => [&[0, kind, 0, 1, 0, 6][..], &from, &[0, 0], &ether_type].concat(),
            Format::NgSll2 => [&ether_type[..], &[0, 0, 0, 0, 0, 2, 0, 1, kind, 6], &from, &[0, 0]].concat(),
            Format::PcapNull => vec![if v4 { 2 } else { 30 }, 0, 0, 0],
        }
    }

    /// The whole file.
    pub(crate) fn write(self, about: &str, entries: &[Entry<'_>]) -> Vec<u8> {
        match self.extension() {
            "pcap" => self.pcap(entries),
            _ => self.pcapng(about, entries),
        }
    }

    fn pcap(self, entries: &[Entry<'_>]) -> Vec<u8> {
        let raw = self == Format::PcapRaw;
        let header = PcapHeader {
            datalink: self.link(),
            ts_resolution: if raw { PcapTsResolution::NanoSecond } else { PcapTsResolution::MicroSecond },
            endianness: if raw { Endianness::Big } else { Endianness::Little },
            ..PcapHeader::default()
        };
        let mut writer = PcapWriter::with_header(Vec::new(), header).expect("memory takes it");
        for entry in entries {
            let data = [&self.header(entry), entry.packet.bytes()].concat();
            let length = data.len() as u32;
            let packet = PcapPacket::new(entry.at, length, data).expect("the time is of this century");
            writer.write_packet(&packet).expect("memory takes it");
        }
        writer.into_inner()
    }

    fn pcapng(self, about: &str, entries: &[Entry<'_>]) -> Vec<u8> {
        let comment = SectionHeaderOption::Common(CommonOption::Comment(Cow::Borrowed(about)));
        let section = SectionHeaderBlock {
            endianness: Endianness::Little,
            options: vec![comment],
            ..SectionHeaderBlock::default()
        };
        let mut writer = PcapNgWriter::with_section_header(Vec::new(), section).expect("memory takes it");
        let interface = InterfaceDescriptionBlock {
            linktype: self.link(),
            snaplen: 0,
            options: vec![InterfaceDescriptionOption::IfTsResol(InterfaceTsResolution::NANO)],
        };
        writer.write_block(&interface.into_block()).expect("memory takes it");
        for entry in entries {
            let data = [&self.header(entry), entry.packet.bytes()].concat();
            let flags = match entry.direction {
                Direction::In => 1,
                Direction::Out => 2,
            };
            let directed = self == Format::NgRaw;
            let block = EnhancedPacketBlock {
                interface_id: 0,
                timestamp: entry.at,
                original_len: data.len() as u32,
                data: Cow::Owned(data),
                options: directed.then_some(EnhancedPacketOption::Flags(flags)).into_iter().collect(),
            };
            writer.write_block(&block.into_block()).expect("memory takes it");
        }
        writer.into_inner()
    }
}
