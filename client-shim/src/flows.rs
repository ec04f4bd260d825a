//! Redirected connections on disk, so that they survive a restart of the shim (`C12`).
//!
//! The file is named after the network namespace, because `/run` is often shared between namespaces.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use shunt_stack::redirect::FlowRecord;

/// Changes when [`FlowRecord`] does: what another version wrote is not read.
const VERSION: u32 = 1;
/// The largest file read, in bytes: more than the largest flow table needs.
const MAX_FILE: u64 = 4 << 30;

#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    flows: Vec<FlowRecord>,
}

/// The file of the calling thread's network namespace.
#[derive(Debug, Clone)]
pub(crate) struct FlowFile {
    path: PathBuf,
}

impl FlowFile {
    /// Names the file; creates the directory.
    ///
    /// # Errors
    /// The directory cannot be created, or the namespace cannot be told.
    pub(crate) fn new(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let namespace = shunt_host::namespace_id()?;
        Ok(Self { path: directory.join(format!("client-flows.{namespace}.json")) })
    }

    /// The file's name.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What an earlier run saved; nothing if there is no file.
    ///
    /// # Errors
    /// The file cannot be read, or is damaged.
    pub(crate) fn load(&self) -> io::Result<Vec<FlowRecord>> {
        match fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
            Ok(metadata) if metadata.len() > MAX_FILE => return Err(io::ErrorKind::FileTooLarge.into()),
            Ok(_) => {}
        }
        let saved: Saved = serde_json::from_slice(&fs::read(&self.path)?)?;
        Ok(if saved.version == VERSION { saved.flows } else { Vec::new() })
    }

    /// Replaces the file as a whole; without flows, removes it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn save(&self, flows: Vec<FlowRecord>) -> io::Result<()> {
        if flows.is_empty() {
            return match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        let text = serde_json::to_vec(&Saved { version: VERSION, flows })?;
        let new = self.path.with_extension("new");
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&text)?;
        fs::rename(&new, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(port: u16) -> FlowRecord {
        FlowRecord {
            local: ([10, 0, 0, 2], port).into(),
            vip: "[2001:db8::10]:443".parse().unwrap(),
            service_port: 41_001,
            irs: u32::MAX,
        }
    }

    #[test]
    fn flows_come_back_as_they_were_saved() {
        let folder = tempfile::tempdir().unwrap();
        let file = FlowFile::new(folder.path()).unwrap();
        assert_eq!(file.load().unwrap(), []);
        file.save(vec![record(1), record(2)]).unwrap();
        assert_eq!(file.load().unwrap(), [record(1), record(2)]);
        file.save(vec![record(3)]).unwrap();
        assert_eq!(file.load().unwrap(), [record(3)]);
    }

    #[test]
    fn without_flows_no_file_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let file = FlowFile::new(folder.path()).unwrap();
        file.save(vec![record(1)]).unwrap();
        file.save(Vec::new()).unwrap();
        file.save(Vec::new()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_file_is_an_error_and_another_versions_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = FlowFile::new(folder.path()).unwrap();
        fs::write(file.path(), "{\"version\":1,").unwrap();
        assert!(file.load().is_err());
        fs::write(file.path(), "{\"version\":999,\"flows\":[]}").unwrap();
        assert_eq!(file.load().unwrap(), []);
    }
}
