//! `[token]` in a daemon's file: who may open connections at service ports, and the file of secret keys.
//!
//! What a key and a requirement are is the roles' business; this reads and checks how they are written.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use toml::Spanned;

use crate::config::{ConfigError, Source};
use crate::prefix::Prefix;

/// Bytes of a file of keys, at most.
const MAX_KEYS_FILE: u64 = 64 << 10;
/// SYNs in a second that are load, unless configured.
const UNDER_LOAD: u64 = 1000;
const MAX_TRUSTED: usize = 1024;

/// The table as written; `R` is the requirement, whose default demands nothing.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default, bound = "R: Deserialize<'de> + Default")]
pub struct TokenSettings<R> {
    /// The absolute path of the file of keys.
    keys: Option<Spanned<PathBuf>>,
    /// When SYNs to service ports need a token.
    require: Option<Spanned<R>>,
    /// SYNs to service ports in a second that are load.
    under_load_syns_per_s: Option<Spanned<u64>>,
    /// Sources that need no token.
    trusted: Option<Spanned<Vec<Prefix>>>,
}

impl<R> Default for TokenSettings<R> {
    fn default() -> Self {
        Self { keys: None, require: None, under_load_syns_per_s: None, trusted: None }
    }
}

/// The table, checked; `K` are the keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenOptions<R, K> {
    /// The keys, if there are any.
    pub keys: Option<Arc<K>>,
    /// When SYNs to service ports need a token.
    pub require: R,
    /// SYNs to service ports in a second that are load.
    pub under_load: u32,
    /// Sources that need no token.
    pub trusted: Vec<Prefix>,
}

impl<R> TokenSettings<R> {
    /// The file of keys, as written.
    pub fn file(&self) -> Option<&Path> {
        self.keys.as_ref().map(|keys| keys.get_ref().as_path())
    }
}

impl<R: Copy + Default + PartialEq> TokenSettings<R> {
    /// Checks the table and reads the keys; `parse` makes keys of the file's text, or says line and mistake.
    ///
    /// # Errors
    /// With file and line. Nothing of the file of keys is repeated but the line's number.
    pub fn resolve<K>(
        &self,
        source: &Source,
        parse: impl FnOnce(&str) -> Result<K, (usize, String)>,
    ) -> Result<TokenOptions<R, K>, ConfigError> {
        let require = self.require.as_ref().map_or_else(R::default, |require| *require.get_ref());
        if let (Some(written), None) = (self.require.as_ref().filter(|_| require != R::default()), &self.keys)
        {
            let message = "tokens can only be required where there are `keys = \"FILE\"` to check them";
            return Err(source.error_at(written.span(), message));
        }
        let under_load =
            source.within(self.under_load_syns_per_s.as_ref(), UNDER_LOAD, 1..=u64::from(u32::MAX))?;
        if let Some(trusted) = self.trusted.as_ref().filter(|list| list.get_ref().len() > MAX_TRUSTED) {
            return Err(source.error_at(trusted.span(), format!("more than {MAX_TRUSTED} prefixes")));
        }
        Ok(TokenOptions {
            keys: self.keys.as_ref().map(|file| keys(source, file, parse)).transpose()?.map(Arc::new),
            require,
            under_load: u32::try_from(under_load).unwrap_or(u32::MAX),
            trusted: self.trusted.as_ref().map(|list| list.get_ref().clone()).unwrap_or_default(),
        })
    }
}

fn keys<K>(
    source: &Source,
    file: &Spanned<PathBuf>,
    parse: impl FnOnce(&str) -> Result<K, (usize, String)>,
) -> Result<K, ConfigError> {
    let path = file.get_ref();
    if !path.is_absolute() {
        // A configuration can be changed and saved elsewhere while it is in force.
        return Err(source.error_at(file.span(), "write the whole path of the file, from / on"));
    }
    let text = secret(path)
        .map_err(|reason| source.error_at(file.span(), format!("the keys {}: {reason}", path.display())))?;
    parse(&text).map_err(|(line, message)| ConfigError::at_line(path, line, message))
}

/// A file's text, if it is none that others may read.
fn secret(path: &Path) -> Result<String, String> {
    let cannot = |error: std::io::Error| format!("cannot read it: {error}{}", crate::sandbox::hint(&error));
    // Asked before it is opened: opening a pipe would wait.
    if !std::fs::metadata(path).map_err(cannot)?.is_file() {
        return Err("this is no file".to_owned());
    }
    let file = std::fs::File::open(path).map_err(cannot)?;
    let metadata = file.metadata().map_err(cannot)?;
    if metadata.permissions().mode() & 0o007 != 0 {
        return Err(
            "others can read or change it, so it is no secret: chmod o= it, and make new keys".to_owned()
        );
    }
    if metadata.len() > MAX_KEYS_FILE {
        return Err(format!("more than {MAX_KEYS_FILE} bytes"));
    }
    let mut text = String::new();
    file.take(MAX_KEYS_FILE).read_to_string(&mut text).map_err(cannot)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use super::*;

    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Demand {
        #[default]
        Never,
        Always,
    }

    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        token: TokenSettings<Demand>,
    }

    type Options = TokenOptions<Demand, String>;

    fn resolve(text: &str) -> Result<Options, ConfigError> {
        let source = Source::new("role.toml", text);
        let file: File = source.parse()?;
        file.token.resolve(&source, |text| match text.find("bad") {
            None => Ok(text.to_owned()),
            Some(at) => Err((text[..at].matches('\n').count() + 1, "a mistake".to_owned())),
        })
    }

    fn keys_file(text: &str, mode: u32) -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let path = path.to_str().unwrap().to_owned();
        (folder, path)
    }

    #[test]
    fn without_the_table_nothing_is_demanded() {
        let options = resolve("").unwrap();
        let expected = Options { keys: None, require: Demand::Never, under_load: 1000, trusted: Vec::new() };
        assert_eq!(options, expected);
    }

    #[test]
    fn every_key_is_read() {
        let (_folder, path) = keys_file("a key", 0o640);
        let text = format!(
            "[token]\nkeys = \"{path}\"\nrequire = \"always\"\nunder_load_syns_per_s = 7\ntrusted = [\"10.0.0.0/8\", \"fd00::1\"]\n"
        );
        let options = resolve(&text).unwrap();
        assert_eq!(options.keys.as_deref().map(String::as_str), Some("a key"));
        assert_eq!((options.require, options.under_load, options.trusted.len()), (Demand::Always, 7, 2));
    }

    #[test]
    fn mistakes_are_told_with_their_line_and_no_secret() {
        let (_folder, open) = keys_file("a key", 0o644);
        let (_other, wrong) = keys_file("good\nbad secret\n", 0o600);
        for (text, line, told) in [
            ("require = \"always\"".to_owned(), 2, "where there are `keys"),
            ("require = \"sometimes\"".to_owned(), 2, "unknown variant"),
            ("keys = \"keys\"".to_owned(), 2, "the whole path"),
            ("keys = \"/nonexistent/keys\"".to_owned(), 2, "cannot read it"),
            ("keys = \"/dev/zero\"".to_owned(), 2, "no file"),
            (format!("keys = \"{open}\""), 2, "others can read"),
            ("under_load_syns_per_s = 0".to_owned(), 2, "between 1"),
            ("trusted = [\"10.0.0.0/33\"]".to_owned(), 2, "33"),
            ("key = 1".to_owned(), 2, "unknown field"),
        ] {
            let error = resolve(&format!("[token]\n{text}\n")).unwrap_err();
            assert!(error.message().contains(told), "{error}");
            assert_eq!(error.line(), Some(line), "{error}");
        }
        let error = resolve(&format!("[token]\nkeys = \"{wrong}\"\n")).unwrap_err();
        assert_eq!((error.path(), error.line()), (Path::new(&wrong), Some(2)));
        assert_eq!(error.to_string(), format!("{wrong}:2: a mistake"));
    }
}
