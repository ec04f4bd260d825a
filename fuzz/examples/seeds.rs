//! Writes the seeds of every target into `corpus/`.

use std::path::Path;
use std::{fs, io};

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for seed in shunt_stack::fuzz::seeds() {
        let folder = corpus.join(seed.target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(&seed.name), &seed.bytes)?;
    }
    let folder = corpus.join("replay");
    fs::create_dir_all(&folder)?;
    for (name, bytes) in shunt_captures::fuzz::seeds() {
        fs::write(folder.join(name), bytes)?;
    }
    Ok(())
}
