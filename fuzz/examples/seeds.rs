//! Writes the seeds of every target into `corpus/`; of captures in the folders named as arguments, into `found/`.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use shunt_captures::{Frame, Reader};

/// Bytes of a capture that make a seed: as long as `run.sh` lets inputs grow.
const MAX_SEED: usize = 1023;
/// Packets of a capture that make seeds.
const MAX_PACKETS: usize = 16;

fn main() -> io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    if !folders.is_empty() {
        return folders.iter().try_for_each(|folder| of_captures(folder, &root.join("found")));
    }
    let corpus = root.join("corpus");
    for seed in shunt_stack::fuzz::seeds() {
        write(&corpus, seed.target, &seed.name, &seed.bytes)?;
    }
    for (name, bytes) in shunt_captures::fuzz::seeds() {
        write(&corpus, "replay", &name, &bytes)?;
    }
    Ok(())
}

fn write(folder: &Path, target: &str, name: &str, bytes: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder.join(target))?;
    fs::write(folder.join(target).join(name), bytes)
}

/// Every capture below `folder`: its beginning, replayed as what it tells, and its packets alone.
fn of_captures(folder: &Path, found: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            of_captures(&path, found)?;
            continue;
        }
        let (bytes, name) = (fs::read(&path)?, path.file_name().unwrap_or_default().to_string_lossy());
        let beginning = &bytes[..bytes.len().min(MAX_SEED)];
        write(found, "replay", &format!("capture-{name}"), &[&[7], beginning].concat())?;
        let Ok(mut reader) = Reader::new(bytes.as_slice()) else { continue };
        let records = std::iter::from_fn(|| reader.next_record()).flatten();
        let packets = records.filter_map(|record| Frame::read(&record).ok());
        for (number, frame) in packets.take(MAX_PACKETS).enumerate() {
            let packet = frame.packet.bytes();
            let packet = &packet[..packet.len().min(MAX_SEED)];
            // As it is: no offload, nothing made right.
            write(found, "packet", &format!("capture-{name}-{number}"), &[&[0; 9], packet].concat())?;
            // Kind 7: the bytes behind it are a packet.
            write(found, "route", &format!("capture-{name}-{number}"), &[&[7], packet].concat())?;
        }
    }
    Ok(())
}
