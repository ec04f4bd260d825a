//! The thread behind a capture: a queue bounded in bytes, and pcapng blocks out of it.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pcap_file::DataLink;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption, InterfaceTsResolution,
};
use pcap_file::pcapng::blocks::opt_common::CommonOption;
use pcap_file::pcapng::{PcapNgBlock, PcapNgWriter};

use super::Direction;

/// Bytes that may wait for the disk.
const QUEUE_BYTES: usize = 16 << 20;
/// What a waiting record costs beside its packet, about.
const RECORD_OVERHEAD: usize = 96;
/// How long a written packet may stay in the buffer.
const FLUSH_INTERVAL: Duration = Duration::from_millis(500);
/// pcapng: a packet of any length.
const SNAP_LENGTH: u32 = 0;

#[derive(Debug)]
pub(super) struct Record {
    pub(super) direction: Direction,
    pub(super) interface: Box<str>,
    pub(super) packet: Box<[u8]>,
    /// What was decided about it; may be empty.
    pub(super) comment: Box<str>,
    /// Since 1970.
    pub(super) time: Duration,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    records: VecDeque<Record>,
    bytes: usize,
    closed: bool,
    lost: u64,
    /// Of `lost`, those not yet said in the file.
    unreported: u64,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, interface: &str, record: impl FnOnce() -> Record) {
        let mut state = self.state();
        if state.closed || state.bytes > QUEUE_BYTES {
            state.lost += 1;
            state.unreported += 1;
            return;
        }
        let record = record();
        state.bytes += record.packet.len() + record.comment.len() + interface.len() + RECORD_OVERHEAD;
        state.records.push_back(record);
        if state.records.len() == 1 {
            self.changed.notify_one();
        }
    }

    pub(super) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_one();
    }

    pub(super) fn lost(&self) -> u64 {
        self.state().lost
    }

    /// Waits for records, no longer than until `deadline`; `None` when closed and empty. Also: records lost before them.
    fn take(&self, deadline: Option<Instant>) -> Option<(VecDeque<Record>, u64)> {
        let mut state = self.state();
        while state.records.is_empty() && !state.closed {
            let Some(deadline) = deadline else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.closed && state.records.is_empty() {
            return None;
        }
        state.bytes = 0;
        let lost = if state.records.is_empty() { 0 } else { std::mem::take(&mut state.unreported) };
        Some((std::mem::take(&mut state.records), lost))
    }
}

pub(super) struct Writer {
    path: PathBuf,
    out: PcapNgWriter<BufWriter<File>>,
    /// Names of the interface blocks written, by number.
    interfaces: Vec<Box<str>>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Writer {
    pub(super) fn new(file: File, path: PathBuf) -> io::Result<Writer> {
        let mut out = PcapNgWriter::new(BufWriter::with_capacity(1 << 16, file)).map_err(io::Error::other)?;
        out.get_mut().flush()?;
        Ok(Writer { path, out, interfaces: Vec::new() })
    }

    /// Writes until the queue is closed, or the disk fails.
    pub(super) fn run(mut self, queue: &Queue) {
        if let Err(error) = self.write_all(queue) {
            tracing::error!(path = %self.path.display(), %error, "the capture ends here");
            queue.close();
        }
    }

    fn write_all(&mut self, queue: &Queue) -> io::Result<()> {
        let mut flush_at = None;
        while let Some((records, lost)) = queue.take(flush_at) {
            let mut lost = Some(lost).filter(|lost| *lost > 0);
            for record in &records {
                self.write(record, lost.take()).map_err(io::Error::other)?;
            }
            if !records.is_empty() {
                flush_at = flush_at.or_else(|| Some(Instant::now() + FLUSH_INTERVAL));
            }
            if flush_at.is_some_and(|at| at <= Instant::now()) {
                self.out.get_mut().flush()?;
                flush_at = None;
            }
        }
        self.out.get_mut().flush()
    }

    fn write(
        &mut self,
        record: &Record,
        lost: Option<u64>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let interface_id = self.interface(&record.interface)?;
        // epb_flags: bits 0 and 1 are the direction.
        let flags = match record.direction {
            Direction::In => 1,
            Direction::Out => 2,
        };
        let mut options = vec![EnhancedPacketOption::Flags(flags)];
        options.extend(lost.map(EnhancedPacketOption::DropCount));
        if !record.comment.is_empty() {
            let comment = CommonOption::Comment(Cow::Borrowed(&record.comment));
            options.push(EnhancedPacketOption::Common(comment));
        }
        let block = EnhancedPacketBlock {
            interface_id,
            timestamp: record.time,
            original_len: u32::try_from(record.packet.len())?,
            data: Cow::Borrowed(&record.packet),
            options,
        };
        self.out.write_block(&block.into_block())?;
        Ok(())
    }

    /// The number of the interface of this name; its block is written before its first packet.
    fn interface(&mut self, name: &str) -> Result<u32, Box<dyn std::error::Error + Send + Sync>> {
        if let Some(number) = self.interfaces.iter().position(|known| **known == *name) {
            return Ok(u32::try_from(number)?);
        }
        let block = InterfaceDescriptionBlock {
            linktype: DataLink::RAW,
            snaplen: SNAP_LENGTH,
            options: vec![
                InterfaceDescriptionOption::IfName(Cow::Borrowed(name)),
                InterfaceDescriptionOption::IfTsResol(InterfaceTsResolution::NANO),
            ],
        };
        self.out.write_block(&block.into_block())?;
        self.interfaces.push(name.into());
        Ok(u32::try_from(self.interfaces.len() - 1)?)
    }
}
