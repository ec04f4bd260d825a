//! Writes the captures of `captures/golden` anew, with what replay says of them.

use std::path::Path;
use std::{fs, io};

use shunt_captures::golden;

fn main() -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let all = golden::make();
    for golden in &all {
        fs::write(folder.join(&golden.name), &golden.bytes)?;
        fs::write(folder.join(format!("{}.expect", golden.name)), golden.replayed().0)?;
    }
    for (name, text) in golden::CONFIGS {
        fs::write(folder.join(name), text)?;
    }
    fs::write(folder.join("README.md"), golden::readme(&all))
}
