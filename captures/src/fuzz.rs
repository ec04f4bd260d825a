//! The body of the fuzz target `replay` in `fuzz/`, here so that `cargo test` replays every corpus file and every crash.

use std::sync::LazyLock;

use shunt_balancer::{Balancer, Config, SelectKey};
use shunt_host::Source;
use shunt_stack::wire::{DEFAULT_EXID, Packet};

use crate::golden::{self, Golden};
use crate::{Ladder, Learned, MAX_CAPTURED, Reader, Replay, Role, Row, SentWriter};

/// Rows that are drawn and written; the fuzzer's files are small.
const MAX_ROWS: usize = 4096;

static EXAMPLES: LazyLock<Vec<Golden>> = LazyLock::new(golden::make);

/// The golden captures' balancer. Filling its tables takes longer than all the rest: those after it share them.
static BALANCER: LazyLock<(Config, Balancer)> = LazyLock::new(|| {
    let config = Config::parse(&Source::new("balancer.toml", golden::BALANCER));
    let config = config.unwrap_or_else(|error| panic!("{error}"));
    let balancer = Balancer::new(&config, SelectKey([0; 16]));
    (config, balancer)
});

/// A role as the golden captures have it, or what the capture itself tells.
fn role(choice: u8, capture: &[u8]) -> Role {
    let kind = choice & 7;
    if kind == 0 {
        let (config, balancer) = &*BALANCER;
        return Role::balancer_like(balancer.successor(config), config);
    }
    let config = ["balancer.toml", "client.toml", "server.toml"].get(usize::from(choice & 3)).copied();
    if choice & 4 == 0 {
        let example = EXAMPLES.iter().find(|golden| golden.config == config);
        return example.map_or(Role::Wire { exid: DEFAULT_EXID }, Golden::role);
    }
    if let Ok(mut reader) = Reader::new(capture) {
        let learned = Learned::of(&mut reader, DEFAULT_EXID);
        assert!(learned.vips.len() <= 4096 && learned.services().len() <= 4096);
    }
    Role::Wire { exid: DEFAULT_EXID }
}

/// One byte for the role, then a file, read as a capture and replayed, drawn and written.
///
/// # Panics
/// If a packet is longer than any may be, numbers or places in the file go backwards, what is fatal is not the end, a
/// right checksum becomes wrong, what is sent does not parse, a row is no line, or more rows come than there can be.
pub fn replay(data: &[u8]) {
    let Some((choice, capture)) = data.split_first() else { return };
    let mut reader = match Reader::new(capture) {
        Ok(reader) => reader,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let mut replay = Replay::new(role(*choice, capture));
    let (mut ladder, mut rows) = (Ladder::new(), Vec::new());
    let (mut number, mut offset, mut ended) = (0, 0, false);
    while let Some(next) = reader.next_record() {
        assert!(!ended, "nothing comes behind what is fatal");
        let at = next.as_ref().map_or_else(|trouble| trouble.offset, |record| record.offset);
        let this = next.as_ref().map_or_else(|trouble| trouble.number, |record| record.number);
        assert!(this > number && at >= offset && at <= capture.len() as u64, "{number} {this} {offset} {at}");
        (number, offset) = (this, at);
        match next {
            Ok(record) => {
                assert!(record.data.len() <= MAX_CAPTURED.min(capture.len()));
                assert!(record.original_len as usize >= record.data.len());
                replay.record(&record, |row| rows.push(row));
            }
            Err(trouble) => {
                ended = trouble.fatal;
                rows.push(replay.trouble(&trouble));
            }
        }
        assert!(reader.offset() <= capture.len() as u64);
    }
    assert!(reader.next_record().is_none());
    assert!(replay.tally().packets <= capture.len() as u64);
    rows.truncate(MAX_ROWS);
    let mut writer = SentWriter::new(Vec::new()).expect("memory takes it");
    for row in &rows {
        check(row);
        ladder.row(row);
        // A time that no capture can say is an error, not a panic.
        let _ = writer.row(row);
    }
    assert!(ladder.text().lines().count() <= 1 << 17);
    assert!(ladder.svg().starts_with("<svg"));
}

fn check(row: &Row) {
    let line = row.to_string();
    assert!(!line.contains('\n') && !row.json().contains('\n'), "{line}");
    assert!(serde_json::from_str::<serde_json::Value>(&row.json()).is_ok());
    assert!(row.time <= row.at, "{line}");
    for sent in &row.sent {
        // What could not be parsed above IP is passed on as it is (B4).
        let again = Packet::from_slice(sent.packet.bytes());
        assert!(
            again.is_ok() || row.notes.iter().any(|note| note.contains("unreadable")),
            "{line}: {again:?}"
        );
    }
}

/// The seeds of the target: a role, and a golden capture. `cargo run --example seeds` in `fuzz/` writes them.
///
/// # Panics
/// If a golden capture that it names is gone.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    const NAMES: [(u8, &str); 13] = [
        (0, "handover-balancer-v4.pcapng"),
        (0, "move-balancer-v6.pcapng"),
        (0, "plain-balancer-v4.pcapng"),
        (1, "handover-ack-lost-client-v4.pcapng"),
        (1, "token-keys-differ-client-v6.pcapng"),
        (2, "reconnect-server-v6.pcapng"),
        (2, "probe-server-v4.pcapng"),
        (3, "reconnect-wire-v4.pcap"),
        (3, "plain-wire-v6.pcap"),
        (4, "two-answers-wire-v6.pcapng"),
        (4, "move-reset-wire-v4.pcap"),
        (7, "probe-wire-v4.pcapng"),
        (7, "move-on-wire-v6.pcapng"),
    ];
    let seed = |(choice, name): &(u8, &str)| {
        let golden = EXAMPLES.iter().find(|golden| golden.name == *name).expect("there is such a capture");
        (format!("{choice}-{name}"), [&[*choice], golden.bytes.as_slice()].concat())
    };
    NAMES.iter().map(seed).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use proptest::prelude::*;

    use super::*;

    fn folder(kind: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz").join(kind).join("replay")
    }

    fn files(kind: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder(kind)).expect("fuzz/ of the repository has to be there");
        let files = entries.map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_none_or(|extension| extension != "md")).collect()
    }

    #[test]
    fn every_corpus_file_and_crash_passes_its_target() {
        let corpus = files("corpus");
        assert!(corpus.len() >= seeds().len());
        for file in corpus.into_iter().chain(files("crashes")) {
            let bytes = fs::read(&file).unwrap();
            assert!(
                std::panic::catch_unwind(|| replay(&bytes)).is_ok(),
                "replay breaks on {}",
                file.display()
            );
        }
    }

    #[test]
    fn the_seeds_committed_are_those_generated() {
        for (name, bytes) in seeds() {
            let file = folder("corpus").join(name);
            let committed = fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            assert!(committed == bytes, "{}: `cargo run --example seeds` in fuzz/ writes it", file.display());
        }
    }

    /// A seed with one thing wrong.
    fn broken() -> impl Strategy<Value = Vec<u8>> {
        let seed = any::<prop::sample::Index>().prop_map(|index| index.get(&seeds()).1.clone());
        let what = (0u8..6, any::<prop::sample::Index>(), any::<[u8; 4]>());
        (seed, what).prop_map(|(mut bytes, (kind, at, value))| {
            let at = 1 + at.index(bytes.len() - 1);
            match kind {
                0 => bytes.truncate(at),
                1 => bytes[at] ^= value[0],
                2 => drop(bytes.splice(at..at, value)),
                3 => drop(bytes.remove(at)),
                // Lengths stand at multiples of 4 in a file.
                4 | 5 => {
                    let at = (at - 1) / 4 * 4 + 1;
                    let huge = if kind == 4 { value } else { [0xff, 0xff, 0xff, 0x7f] };
                    let end = bytes.len().min(at + 4);
                    bytes[at..end].copy_from_slice(&huge[..end - at]);
                }
                _ => unreachable!(),
            }
            bytes
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if std::env::var_os("SHUNT_TEST_FULL").is_some() { 20_000 } else { 1000 }))]

        #[test]
        fn a_file_with_anything_wrong_is_read_as_far_as_it_goes(bytes in broken()) {
            replay(&bytes);
        }

        #[test]
        fn any_bytes_are_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            replay(&bytes);
        }

        /// Where a file ends early, all packets before the end are read, and the end is told with its place.
        #[test]
        fn a_cut_file_gives_the_packets_before_the_cut(
            index in any::<prop::sample::Index>(),
            at in any::<prop::sample::Index>(),
        ) {
            let (_, bytes) = index.get(&seeds()).clone();
            let whole = &bytes[1..];
            let cut = &whole[..at.index(whole.len())];
            let all: Vec<_> = records(whole).into_iter().map(Result::unwrap).collect();
            let Ok(mut reader) = Reader::new(cut) else { return Ok(()) };
            let mut read = Vec::new();
            let mut trouble = None;
            while let Some(next) = reader.next_record() {
                match next {
                    Ok(record) => read.push(record),
                    Err(error) => trouble = Some(error),
                }
            }
            prop_assert_eq!(&read[..], &all[..read.len()]);
            // Those that end before the cut are all there.
            let next = all.get(read.len());
            if let Some(trouble) = trouble {
                prop_assert!(trouble.fatal && trouble.offset <= cut.len() as u64);
                prop_assert_eq!(trouble.number, read.len() as u64 + 1);
            } else {
                prop_assert!(next.is_none_or(|next| next.offset >= cut.len() as u64), "{:?}", cut.len());
            }
        }
    }

    fn records(bytes: &[u8]) -> Vec<Result<crate::Record, crate::Trouble>> {
        let mut reader = Reader::new(bytes).unwrap();
        std::iter::from_fn(move || reader.next_record()).collect()
    }
}
