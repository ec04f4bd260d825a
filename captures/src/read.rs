//! Reading captures: pcap and pcapng, a packet at a time, in bounded memory.
//!
//! What a file says wrongly is told with the packet's number and the place in the file; packets before it, and where
//! the format allows it those behind it, are read.

use std::fs::File;
use std::io::{self, Chain, Cursor, Read};
use std::path::Path;
use std::time::Duration;

use bytes::BytesMut;
use pcap_file::DataLink;
use pcap_file::pcap::{PcapReadError, PcapReader, PcapTsResolution, RawPcapPacket};
use pcap_file::pcapng::blocks::block_common::{
    ENHANCED_PACKET_BLOCK, INTERFACE_DESCRIPTION_BLOCK, PACKET_BLOCK, SECTION_HEADER_BLOCK,
    SIMPLE_PACKET_BLOCK,
};
use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption;
use pcap_file::pcapng::{Block, PcapNgReadError, PcapNgReader, PcapNgState, RawBlock};
use shunt_stack::device::Direction;
use thiserror::Error;

/// Bytes read ahead: also the longest block of a pcapng file.
const BUFFER: usize = 1 << 20;
/// The longest packet of a capture, as in libpcap (`MAXIMUM_SNAPLEN`).
pub const MAX_CAPTURED: usize = 262_144;
/// What the interface blocks of a pcapng section may take together, in bytes.
const MAX_INTERFACE_BYTES: usize = 4 << 20;

/// Length of a pcap file's header.
const PCAP_HEADER: u64 = 24;
/// Length of a packet's header in it.
const PCAP_RECORD: u64 = 16;
/// pcapng, `epb_flags`: the two bits that say the direction.
const DIRECTION_BITS: u32 = 3;

/// A packet of a capture, as it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its number in the file, from 1.
    pub number: u64,
    /// Where in the file it stands, in bytes.
    pub offset: u64,
    /// When it passed, since 1970. A packet without a time has that of the one before it.
    pub time: Duration,
    /// What its first bytes are.
    pub link: DataLink,
    /// Which way it went, from the view of the host that captured it, where the file says so.
    pub direction: Option<Direction>,
    /// Its length on the wire.
    pub original_len: u32,
    /// What was captured of it.
    pub data: BytesMut,
}

/// Why a file cannot be read as a capture at all.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The file cannot be read.
    #[error("cannot read the capture: {0}")]
    Io(#[from] io::Error),
    /// There is nothing in it.
    #[error(
        "the file is empty: was the capture still being written, or written by a program that was killed?"
    )]
    Empty,
    /// It is another kind of file.
    #[error("this is {what}, not a pcap or pcapng file: {advice}")]
    Foreign {
        /// What it is.
        what: &'static str,
        /// What makes a capture of it.
        advice: &'static str,
    },
    /// It begins as no capture does.
    #[error("this is no capture: it begins with {0:02x?}, as neither pcap nor pcapng does")]
    Unknown([u8; 4]),
    /// Its header is cut off.
    #[error("the file ends within its header")]
    Header,
    /// Its header is wrong.
    #[error("the header of the file is wrong: {0}")]
    Corrupt(String),
}

/// What is wrong at one place of a file.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("packet {number}, byte {offset} of the file: {what}")]
pub struct Trouble {
    /// The packet's number, or what it would have been.
    pub number: u64,
    /// Where it begins in the file.
    pub offset: u64,
    /// What is wrong.
    pub what: What,
    /// Whether nothing behind it can be read.
    pub fatal: bool,
}

/// What can be wrong within a capture.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum What {
    /// The file ends within it.
    #[error("the file is cut off here, or the length of what follows is wrong")]
    Cut,
    /// It is longer than any packet.
    #[error("it claims to be {0} bytes long: the file is corrupt from here on")]
    Oversized(u32),
    /// The disk, or whatever is read, failed.
    #[error("reading failed: {0}")]
    Io(String),
    /// A block that says something else than it is.
    #[error("{0}")]
    Block(String),
    /// More about interfaces than any capture needs.
    #[error("the descriptions of its interfaces take more than {MAX_INTERFACE_BYTES} bytes")]
    Interfaces,
}

type Input<R> = Chain<Cursor<Vec<u8>>, R>;

enum Format<R: Read> {
    Pcap(PcapReader<Input<R>>),
    PcapNg(Box<PcapNgReader<Input<R>>>),
}

/// A capture that is being read.
pub struct Reader<R: Read> {
    format: Format<R>,
    number: u64,
    offset: u64,
    last_time: Duration,
    missing: u64,
    interface_bytes: usize,
    ended: bool,
}

impl Reader<File> {
    /// Opens a file.
    ///
    /// # Errors
    /// It cannot be read, or is no capture.
    pub fn open(path: &Path) -> Result<Reader<File>, OpenError> {
        Reader::new(File::open(path)?)
    }
}

/// The two readers of the crate fail alike.
enum Fault {
    Io(io::Error),
    Other(String),
}

impl From<PcapReadError> for Fault {
    fn from(error: PcapReadError) -> Fault {
        match error {
            PcapReadError::Io(error) => Fault::Io(error),
            PcapReadError::Validation(error) => Fault::Other(error.to_string()),
        }
    }
}

impl From<PcapNgReadError> for Fault {
    fn from(error: PcapNgReadError) -> Fault {
        match error {
            PcapNgReadError::Io(error) => Fault::Io(error),
            other => Fault::Other(chain(&other)),
        }
    }
}

/// An error with its causes, which alone say what is wrong.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

impl From<Fault> for OpenError {
    fn from(fault: Fault) -> OpenError {
        match fault {
            Fault::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => OpenError::Header,
            Fault::Io(error) => OpenError::Io(error),
            Fault::Other(text) => OpenError::Corrupt(text),
        }
    }
}

impl From<Fault> for What {
    fn from(fault: Fault) -> What {
        match fault {
            Fault::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => What::Cut,
            Fault::Io(error) => What::Io(error.to_string()),
            Fault::Other(text) => What::Block(text),
        }
    }
}

impl<R: Read> Reader<R> {
    /// Begins to read.
    ///
    /// # Errors
    /// It cannot be read, or is no capture.
    pub fn new(mut input: R) -> Result<Reader<R>, OpenError> {
        let mut magic = Vec::with_capacity(4);
        input.by_ref().take(4).read_to_end(&mut magic)?;
        let first = match *magic.as_slice() {
            [] => return Err(OpenError::Empty),
            [a, b, c, d] => [a, b, c, d],
            [..] => return Err(OpenError::Header),
        };
        let input = Cursor::new(magic).chain(input);
        let format = match first {
            [0xa1, 0xb2, 0xc3, 0xd4]
            | [0xd4, 0xc3, 0xb2, 0xa1]
            | [0xa1, 0xb2, 0x3c, 0x4d]
            | [0x4d, 0x3c, 0xb2, 0xa1] => {
                Format::Pcap(PcapReader::with_capacity(input, BUFFER).map_err(Fault::from)?)
            }
            [0x0a, 0x0d, 0x0d, 0x0a] => {
                Format::PcapNg(Box::new(PcapNgReader::with_capacity(input, BUFFER).map_err(Fault::from)?))
            }
            other => return Err(foreign(other)),
        };
        let offset = match &format {
            Format::Pcap(_) => PCAP_HEADER,
            Format::PcapNg(reader) => reader.bytes_parsed(),
        };
        let (last_time, missing, interface_bytes) = (Duration::ZERO, 0, 0);
        Ok(Reader { format, number: 0, offset, last_time, missing, interface_bytes, ended: false })
    }

    /// Bytes of the file that have been read as packets.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Packets that the file says are missing in it, because whoever captured could not follow.
    pub fn missing(&self) -> u64 {
        self.missing
    }

    /// The next packet, or what stands in its place. `None` at the end, and behind what is fatal.
    pub fn next_record(&mut self) -> Option<Result<Record, Trouble>> {
        if self.ended {
            return None;
        }
        let result = match self.format {
            Format::Pcap(_) => self.next_pcap(),
            Format::PcapNg(_) => self.next_pcapng(),
        };
        match &result {
            None => self.ended = true,
            Some(Ok(record)) => self.last_time = record.time,
            Some(Err(trouble)) => self.ended = trouble.fatal,
        }
        result
    }

    fn next_pcap(&mut self) -> Option<Result<Record, Trouble>> {
        let Format::Pcap(reader) = &mut self.format else { return None };
        let header = reader.header();
        let offset = self.offset;
        let next = reader.next_raw_packet()?;
        self.number += 1;
        let trouble = |what: What| Trouble { number: self.number, offset, what, fatal: true };
        let raw = match next {
            Ok(raw) => raw,
            Err(error) => return Some(Err(trouble(Fault::from(error).into()))),
        };
        if raw.data.len() > MAX_CAPTURED {
            return Some(Err(trouble(What::Oversized(raw.incl_len))));
        }
        self.offset += PCAP_RECORD + raw.data.len() as u64;
        Some(Ok(Record {
            number: self.number,
            offset,
            time: pcap_time(&raw, header.ts_resolution),
            // The upper bits may say how long the frame check sequence is.
            link: DataLink::from(u32::from(header.datalink) & 0xffff),
            direction: None,
            original_len: raw.orig_len.max(raw.incl_len),
            data: BytesMut::from(&raw.data[..]),
        }))
    }

    fn next_pcapng(&mut self) -> Option<Result<Record, Trouble>> {
        let Format::PcapNg(reader) = &mut self.format else { return None };
        loop {
            let offset = self.offset;
            let number = self.number + 1;
            let trouble = |what: What, fatal| Some(Err(Trouble { number, offset, what, fatal }));
            let (block, state) = match reader.next_raw_block()? {
                Ok(next) => next,
                Err(error) => return trouble(Fault::from(error).into(), true),
            };
            let length = block.body.len() + 12;
            let kind = block.type_;
            let read = match kind {
                ENHANCED_PACKET_BLOCK | SIMPLE_PACKET_BLOCK | PACKET_BLOCK => Some(convert(block, state)),
                _ => None,
            };
            self.offset += length as u64;
            match kind {
                SECTION_HEADER_BLOCK => self.interface_bytes = 0,
                INTERFACE_DESCRIPTION_BLOCK => self.interface_bytes += length,
                _ => {}
            }
            if self.interface_bytes > MAX_INTERFACE_BYTES {
                return trouble(What::Interfaces, true);
            }
            let Some(read) = read else { continue };
            self.number = number;
            let read = match read {
                Ok(read) => read,
                Err(text) => return trouble(What::Block(text), false),
            };
            if read.data.len() > MAX_CAPTURED {
                return trouble(What::Oversized(read.data.len() as u32), false);
            }
            self.missing = self.missing.saturating_add(read.missing);
            return Some(Ok(Record {
                number,
                offset,
                time: read.time.unwrap_or(self.last_time),
                link: read.link,
                direction: read.direction,
                original_len: read.original_len,
                data: read.data,
            }));
        }
    }
}

/// A fraction of a second that is none counts as the end of that second.
fn pcap_time(raw: &RawPcapPacket<'_>, resolution: PcapTsResolution) -> Duration {
    let nanos = match resolution {
        PcapTsResolution::MicroSecond => raw.ts_frac.min(999_999) * 1000,
        PcapTsResolution::NanoSecond => raw.ts_frac.min(999_999_999),
    };
    Duration::new(u64::from(raw.ts_sec), nanos)
}

/// What a pcapng block says of a packet.
struct BlockPacket {
    time: Option<Duration>,
    link: DataLink,
    direction: Option<Direction>,
    original_len: u32,
    data: BytesMut,
    missing: u64,
}

fn convert(block: RawBlock<'_>, state: &PcapNgState) -> Result<BlockPacket, String> {
    let link = |interface: usize| {
        let found = state.interfaces().get(interface).map(|interface| interface.linktype);
        found.ok_or_else(|| format!("interface {interface} is not described"))
    };
    match block.try_into_block(state).map_err(|error| chain(&error))? {
        Block::EnhancedPacket(packet) => {
            let (mut direction, mut missing) = (None, 0);
            for option in &packet.options {
                match option {
                    EnhancedPacketOption::Flags(flags) => direction = direction_of(*flags),
                    EnhancedPacketOption::DropCount(count) => missing = *count,
                    _ => {}
                }
            }
            Ok(BlockPacket {
                time: Some(packet.timestamp),
                link: link(packet.interface_id as usize)?,
                direction,
                original_len: packet.original_len,
                data: BytesMut::from(&packet.data[..]),
                missing,
            })
        }
        Block::SimplePacket(packet) => Ok(BlockPacket {
            time: None,
            link: link(0)?,
            direction: None,
            original_len: packet.original_len,
            data: BytesMut::from(&packet.data[..]),
            missing: 0,
        }),
        Block::Packet(packet) => Ok(BlockPacket {
            time: Some(packet.timestamp),
            link: link(usize::from(packet.interface_id))?,
            direction: None,
            original_len: packet.original_len,
            data: BytesMut::from(&packet.data[..]),
            // All ones: not known.
            missing: if packet.drop_count == u16::MAX { 0 } else { u64::from(packet.drop_count) },
        }),
        _ => Err("it is no packet".to_owned()),
    }
}

fn direction_of(flags: u32) -> Option<Direction> {
    match flags & DIRECTION_BITS {
        1 => Some(Direction::In),
        2 => Some(Direction::Out),
        _ => None,
    }
}

/// What else network people have files of.
fn foreign(first: [u8; 4]) -> OpenError {
    const CONVERT: &str = "convert it with `editcap -F pcapng FILE NEW.pcapng`";
    let (what, advice) = match first {
        [0x1f, 0x8b, ..] => ("compressed by gzip", "decompress it with `gunzip` first"),
        [0x28, 0xb5, 0x2f, 0xfd] => ("compressed by zstd", "decompress it with `zstd -d` first"),
        [0xfd, b'7', b'z', b'X'] => ("compressed by xz", "decompress it with `unxz` first"),
        [b'B', b'Z', b'h', _] => ("compressed by bzip2", "decompress it with `bunzip2` first"),
        [0x04, 0x22, 0x4d, 0x18] => ("compressed by lz4", "decompress it with `unlz4` first"),
        [b'P', b'K', ..] => ("a zip archive", "unpack it first"),
        [b's', b'n', b'o', b'o'] => ("a capture of snoop", CONVERT),
        [b'G', b'M', b'B', b'U'] | [b'R', b'T', b'S', b'S'] => ("a capture of Network Monitor", CONVERT),
        [0xa1, 0xb2, 0xcd, 0x34] | [0x34, 0xcd, 0xb2, 0xa1] => ("a modified kind of pcap", CONVERT),
        [0x7f, b'E', b'L', b'F'] => ("a program", "name the capture"),
        other => return OpenError::Unknown(other),
    };
    OpenError::Foreign { what, advice }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketBlock;
    use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionBlock;
    use pcap_file::pcapng::blocks::packet::PacketBlock;
    use pcap_file::pcapng::blocks::simple_packet::SimplePacketBlock;
    use pcap_file::pcapng::{PcapNgBlock, PcapNgWriter};

    use super::*;

    fn read(bytes: &[u8]) -> Vec<Result<Record, Trouble>> {
        let mut reader = Reader::new(bytes).unwrap();
        std::iter::from_fn(|| reader.next_record()).collect()
    }

    fn writer() -> PcapNgWriter<Vec<u8>> {
        let mut writer = PcapNgWriter::new(Vec::new()).unwrap();
        for (link, snaplen) in [(DataLink::RAW, 0), (DataLink::ETHERNET, 60)] {
            writer.write_block(&InterfaceDescriptionBlock::new(link, snaplen).into_block()).unwrap();
        }
        writer
    }

    fn enhanced(
        seconds: u64,
        data: &'static [u8],
        options: Vec<EnhancedPacketOption<'static>>,
    ) -> Block<'static> {
        let (timestamp, original_len) = (Duration::from_secs(seconds), data.len() as u32 + 7);
        let data = Cow::Borrowed(data);
        EnhancedPacketBlock { interface_id: 1, timestamp, original_len, data, options }.into_block()
    }

    #[test]
    fn every_kind_of_packet_block_is_read() {
        let mut writer = writer();
        let options = vec![EnhancedPacketOption::Flags(2), EnhancedPacketOption::DropCount(3)];
        writer.write_block(&enhanced(9, b"one", options)).unwrap();
        let simple = SimplePacketBlock { original_len: 4, data: Cow::Borrowed(b"four") };
        writer.write_block(&simple.into_block()).unwrap();
        let old = PacketBlock {
            interface_id: 0,
            drop_count: 5,
            timestamp: Duration::from_secs(11),
            original_len: 6,
            data: Cow::Borrowed(b"eleven"),
            options: Vec::new(),
        };
        writer.write_block(&old.into_block()).unwrap();
        let bytes = writer.into_inner();
        let mut reader = Reader::new(bytes.as_slice()).unwrap();
        let mut next = || reader.next_record().unwrap().unwrap();
        let (one, two, three) = (next(), next(), next());
        assert_eq!((one.number, one.time.as_secs(), one.original_len), (1, 9, 10));
        assert_eq!(
            (one.link, one.direction, &one.data[..]),
            (DataLink::ETHERNET, Some(Direction::Out), &b"one"[..])
        );
        // Without a time of its own it has that of the packet before.
        assert_eq!(
            (two.number, two.time.as_secs(), two.link, &two.data[..]),
            (2, 9, DataLink::RAW, &b"four"[..])
        );
        assert_eq!((three.number, three.time.as_secs(), &three.data[..]), (3, 11, &b"eleven"[..]));
        assert!(one.offset < two.offset && two.offset < three.offset);
        assert!(reader.next_record().is_none());
        assert_eq!((reader.missing(), reader.offset()), (8, bytes.len() as u64));
    }

    #[test]
    fn a_block_that_is_wrong_is_passed_over_and_told_with_its_place() {
        let mut writer = writer();
        for second in 0..3 {
            writer.write_block(&enhanced(second, b"data", Vec::new())).unwrap();
        }
        let mut bytes = writer.into_inner();
        let places: Vec<u64> = read(&bytes).into_iter().map(|record| record.unwrap().offset).collect();
        // The interface of the second.
        bytes[places[1] as usize + 8] = 9;
        let all = read(&bytes);
        assert!(all[0].is_ok() && all[2].is_ok() && all.len() == 3, "{all:?}");
        let trouble = all[1].as_ref().unwrap_err();
        assert_eq!((trouble.number, trouble.offset, trouble.fatal), (2, places[1], false));
        let text = trouble.to_string();
        assert!(text.starts_with("packet 2, byte ") && text.contains("interface"), "{text}");
        assert_eq!(all[2].as_ref().unwrap().number, 3);
        // Its length: where the next begins nobody knows.
        bytes[places[1] as usize + 4] ^= 4;
        let all = read(&bytes);
        assert!(all.len() == 2 && all[1].as_ref().unwrap_err().fatal, "{all:?}");
    }

    #[test]
    fn a_fraction_of_a_second_that_is_none_and_a_length_that_lies_are_put_up_with() {
        let head: [u32; 6] = [0xa1b2_c3d4, 0x0004_0002, 0, 0, 0, 0xf000_0065];
        // Microseconds beyond a second; more captured than there was.
        let record: [u32; 5] = [7, 2_000_000, 4, 2, 0x4545_4545];
        let bytes: Vec<u8> = head.iter().chain(&record).flat_map(|word| word.to_le_bytes()).collect();
        let all = read(&bytes);
        let record = all[0].as_ref().unwrap();
        assert_eq!((record.time, record.original_len), (Duration::new(7, 999_999_000), 4));
        assert_eq!(record.link, DataLink::RAW);
    }
}
