//! What streams carry: records that say whose they are, so that each end can tell every byte it hears.

use fastrand::Rng;

/// The longest body.
pub(super) const MAX_BODY: u32 = 1 << 20;
const REQUEST: u8 = 0x51;
const RESPONSE: u8 = 0xa2;
const HEADER: usize = 24;

/// The head of a record. Its body follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) kind: Kind,
    /// Whose stream it is of.
    pub(super) flow: u32,
    /// Its place in the stream.
    pub(super) number: u32,
    /// Bytes of its body.
    pub(super) length: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// From a client; asks for a body of so many bytes.
    Request { answer: u32 },
    /// From a server; says which, and by which of its connections.
    Response { server: u16, connection: u16 },
}

impl Record {
    fn header(&self) -> [u8; HEADER] {
        let (kind, word) = match self.kind {
            Kind::Request { answer } => (REQUEST, answer),
            Kind::Response { server, connection } => {
                (RESPONSE, u32::from(server) << 16 | u32::from(connection))
            }
        };
        let mut out = [kind; HEADER];
        for (place, value) in [self.flow, self.number, self.length, word].into_iter().enumerate() {
            out[4 + place * 4..8 + place * 4].copy_from_slice(&value.to_be_bytes());
        }
        out
    }

    fn read(header: &[u8; HEADER]) -> Option<Record> {
        let word = |place: usize| {
            u32::from_be_bytes([header[place], header[place + 1], header[place + 2], header[place + 3]])
        };
        let kind = match header[0] {
            REQUEST => Kind::Request { answer: word(16) },
            RESPONSE => Kind::Response { server: (word(16) >> 16) as u16, connection: word(16) as u16 },
            _ => return None,
        };
        let record = Record { kind, flow: word(4), number: word(8), length: word(12) };
        let small = |length: u32| length <= MAX_BODY;
        let sane = small(record.length)
            && match kind {
                Kind::Request { answer } => small(answer),
                Kind::Response { .. } => true,
            };
        (sane && record.header() == *header).then_some(record)
    }

    /// Appends the record to what is to be sent.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.header());
        let begin = out.len();
        out.resize(begin + self.length as usize, 0);
        self.body().fill(&mut out[begin..]);
    }

    /// Where the bytes of the body come from.
    fn body(&self) -> Rng {
        let header = self.header();
        let word = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().unwrap_or_default());
        Rng::with_seed(word(0) ^ word(8).rotate_left(17) ^ word(16).rotate_left(40))
    }
}

/// Reads records out of a stream.
#[derive(Debug, Default)]
pub(super) struct Reader {
    buffer: Vec<u8>,
}

/// The bytes are no record: they were changed, lost, repeated, or are of something else.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Foreign;

impl Reader {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether the stream may end here.
    pub(super) fn is_between(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The next whole record.
    pub(super) fn next(&mut self) -> Result<Option<Record>, Foreign> {
        let Some(header) = self.buffer.first_chunk::<HEADER>() else { return Ok(None) };
        let record = Record::read(header).ok_or(Foreign)?;
        let end = HEADER + record.length as usize;
        let Some(body) = self.buffer.get(HEADER..end) else { return Ok(None) };
        let mut expected = vec![0; body.len()];
        record.body().fill(&mut expected);
        if body != expected {
            return Err(Foreign);
        }
        self.buffer.drain(..end);
        Ok(Some(record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<Record> {
        let request = Kind::Request { answer: 7 };
        let response = Kind::Response { server: 3, connection: 500 };
        vec![
            Record { kind: request, flow: 9, number: 0, length: 0 },
            Record { kind: request, flow: 9, number: 1, length: 3000 },
            Record { kind: response, flow: 9, number: 0, length: 7 },
        ]
    }

    #[test]
    fn records_come_out_as_they_went_in_however_they_are_cut() {
        let mut bytes = Vec::new();
        for record in records() {
            record.write(&mut bytes);
        }
        for step in [1, 7, 24, 10_000] {
            let (mut reader, mut out) = (Reader::default(), Vec::new());
            for chunk in bytes.chunks(step) {
                reader.push(chunk);
                while let Some(record) = reader.next().unwrap() {
                    out.push(record);
                }
            }
            assert_eq!(out, records());
            assert!(reader.is_between());
        }
    }

    #[test]
    fn a_byte_changed_lost_or_repeated_is_seen() {
        let record = records()[1];
        let mut good = Vec::new();
        record.write(&mut good);
        record.write(&mut good);
        let wrong = |bytes: &[u8]| {
            let mut reader = Reader::default();
            reader.push(bytes);
            loop {
                match reader.next() {
                    Ok(Some(_)) => {}
                    Ok(None) => return !reader.is_between(),
                    Err(Foreign) => return true,
                }
            }
        };
        assert!(!wrong(&good));
        for at in (0..good.len()).step_by(101) {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            assert!(wrong(&bytes), "changed at {at}");
            let mut bytes = good.clone();
            bytes.remove(at);
            assert!(wrong(&bytes), "lost at {at}");
            let mut bytes = good.clone();
            bytes.insert(at, 0x77);
            assert!(wrong(&bytes), "inserted at {at}");
        }
    }
}
