//! Reading a daemon's TOML file, with errors that show the file, the line and its text.
//!
//! What the keys mean is the roles' business; this only reads them and points at what is wrong.

use std::fmt;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use toml::Spanned;

/// What a daemon is, as its file says in `role = "..."`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The stateless forwarder in front of the servers.
    Balancer,
    /// The shim beside a client's TCP.
    Client,
    /// The agent beside a server's TCP.
    Server,
}

impl Role {
    /// All roles.
    pub const ALL: [Role; 3] = [Role::Balancer, Role::Client, Role::Server];

    /// The role as it is written in a file: `balancer`, `client` or `server`.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Balancer => "balancer",
            Role::Client => "client",
            Role::Server => "server",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where in a file a mistake is: the line, its text and the columns to underline.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Location {
    /// Counted from 1.
    line: usize,
    text: String,
    /// In characters, from 0.
    column: usize,
    /// In characters, at least 1.
    width: usize,
}

impl Location {
    /// Of a line that must not be shown.
    fn hidden(line: usize) -> Self {
        Location { line, text: String::new(), column: 0, width: 0 }
    }

    fn is_hidden(&self) -> bool {
        self.width == 0
    }
}

/// A mistake in a configuration file. `Display` shows it as rustc does: `client.toml:12: message`, then the line
/// and carets under the part that is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    path: PathBuf,
    location: Option<Location>,
    message: String,
}

impl ConfigError {
    /// A mistake in a line of a file that holds secrets: its text is not shown.
    pub fn at_line(path: impl Into<PathBuf>, line: usize, message: impl Into<String>) -> Self {
        ConfigError { path: path.into(), location: Some(Location::hidden(line)), message: message.into() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The line, counted from 1; `None` where the mistake is the whole file's.
    pub fn line(&self) -> Option<usize> {
        self.location.as_ref().map(|location| location.line)
    }

    /// What is wrong, without file and line.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        let Some(Location { line, text, column, width }) = &self.location else {
            return write!(f, "{path}: {}", self.message);
        };
        if self.location.as_ref().is_some_and(Location::is_hidden) {
            return write!(f, "{path}:{line}: {}", self.message);
        }
        let number = line.to_string();
        let margin = " ".repeat(number.len());
        // Tabs are kept, so that the carets stand below what they mean.
        let indent: String = text.chars().take(*column).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
        write!(
            f,
            "{path}:{line}: {}\n{margin} |\n{number} | {text}\n{margin} | {indent}{}",
            self.message,
            "^".repeat(*width)
        )
    }
}

impl std::error::Error for ConfigError {}

/// A configuration file as read: its path, for messages, and its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The file as the user named it.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
}

impl Source {
    /// A source from memory; `path` is only shown.
    pub fn new(path: impl Into<PathBuf>, text: impl Into<String>) -> Self {
        Self { path: path.into(), text: text.into() }
    }

    /// Reads `path`.
    ///
    /// # Errors
    /// The file cannot be read, or is not UTF-8.
    pub fn read(path: impl Into<PathBuf>) -> Result<Self, ConfigError> {
        let path = path.into();
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) => {
                return Err(ConfigError {
                    path,
                    location: None,
                    message: format!("cannot read it: {error}{}", crate::sandbox::hint(&error)),
                });
            }
        };
        String::from_utf8(bytes).map(|text| Self { path: path.clone(), text }).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
            Self { path, text }.error_at(at..at, "this is not UTF-8 text")
        })
    }

    /// Parses the text. Unknown keys are errors where `T` says `deny_unknown_fields`.
    ///
    /// # Errors
    /// The text is not TOML, or not a `T`.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        toml::from_str(&self.text).map_err(|error| match error.span() {
            Some(span) if !self.is_whole(&span, error.message()) => self.error_at(span, error.message()),
            _ => self.error(error.message()),
        })
    }

    /// Whether an error is about the top-level table, which has no line of its own: a key it lacks.
    fn is_whole(&self, span: &Range<usize>, message: &str) -> bool {
        span.start == 0 && message.starts_with("missing field") && !self.text.starts_with('[')
    }

    /// An error at `span` (byte offsets, as in [`toml::Spanned`]) of the text.
    pub fn error_at(&self, span: Range<usize>, message: impl Into<String>) -> ConfigError {
        ConfigError { path: self.path.clone(), location: Some(self.locate(span)), message: message.into() }
    }

    /// A number as written, or its default.
    ///
    /// # Errors
    /// It is not in `range`; with its line.
    pub fn within(
        &self,
        written: Option<&Spanned<u64>>,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> Result<u64, ConfigError> {
        match written {
            None => Ok(default),
            Some(value) if range.contains(value.get_ref()) => Ok(*value.get_ref()),
            Some(value) => {
                let message = format!("this must be between {} and {}", range.start(), range.end());
                Err(self.error_at(value.span(), message))
            }
        }
    }

    /// An error of the file as a whole.
    pub fn error(&self, message: impl Into<String>) -> ConfigError {
        ConfigError { path: self.path.clone(), location: None, message: message.into() }
    }

    fn locate(&self, span: Range<usize>) -> Location {
        let text = self.text.as_str();
        let mut start = span.start.min(text.len());
        while !text.is_char_boundary(start) {
            start -= 1;
        }
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |newline| start + newline);
        let line = text[line_start..line_end].trim_end_matches('\r');
        let mut end = span.end.clamp(start, line_end);
        while !text.is_char_boundary(end) {
            end += 1;
        }
        Location {
            line: text[..line_start].matches('\n').count() + 1,
            text: line.to_owned(),
            column: text[line_start..start].chars().count(),
            width: text[start..end].trim_end().chars().count().max(1),
        }
    }
}

/// Reads and parses `path`; the [`Source`] serves later checks through [`Source::error_at`].
///
/// # Errors
/// As [`Source::read`] and [`Source::parse`].
pub fn load<T: DeserializeOwned>(path: impl Into<PathBuf>) -> Result<(Source, T), ConfigError> {
    let source = Source::read(path)?;
    let value = source.parse()?;
    Ok((source, value))
}

#[derive(Deserialize)]
struct RoleOnly {
    role: Option<Spanned<String>>,
}

/// The `role` key of a file, whatever else it holds.
///
/// # Errors
/// Not TOML, no `role`, or one that is not `balancer`, `client` or `server`.
pub fn role_of(source: &Source) -> Result<Role, ConfigError> {
    const CHOICES: &str = r#"`role = "balancer"`, `"client"` or `"server"`"#;
    let Some(written) = source.parse::<RoleOnly>()?.role else {
        return Err(source.error(format!("the file does not say what it is for: add {CHOICES}")));
    };
    Role::ALL.into_iter().find(|role| role.name() == written.get_ref()).ok_or_else(|| {
        source.error_at(written.span(), format!("no role is named {:?}: write {CHOICES}", written.get_ref()))
    })
}

/// Refuses a file that is for another role than `wanted`, before anything else in it is looked at.
///
/// # Errors
/// As [`role_of`], or the role is another.
pub fn expect_role(source: &Source, wanted: Role) -> Result<(), ConfigError> {
    let role = role_of(source)?;
    if role == wanted {
        return Ok(());
    }
    let span = source.parse::<RoleOnly>()?.role.map_or(0..0, |written| written.span());
    Err(source.error_at(span, format!("this is the file of a {role}, not of a {wanted}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[allow(dead_code)]
        role: Role,
        port: Spanned<u16>,
    }

    fn source(text: &str) -> Source {
        Source::new("client.toml", text)
    }

    #[test]
    fn an_unknown_key_is_shown_with_its_line() {
        let error = source("role = \"client\"\nport = 1\nprot = 2\n").parse::<Sample>().unwrap_err();
        assert_eq!(error.line(), Some(3));
        let shown = error.to_string();
        assert!(shown.starts_with("client.toml:3: unknown field `prot`"), "{shown}");
        assert!(shown.ends_with("\n  |\n3 | prot = 2\n  | ^^^^"), "{shown}");
    }

    #[test]
    fn a_value_of_the_wrong_type_is_underlined() {
        let error = source("role = \"client\"\n\tport = \"ü\"\n").parse::<Sample>().unwrap_err();
        assert!(error.to_string().ends_with("2 | \tport = \"ü\"\n  | \t       ^^^"), "{error}");
    }

    #[test]
    fn a_syntax_error_names_its_line() {
        let error = source("role = \"client\"\nport = \n").parse::<Sample>().unwrap_err();
        assert_eq!(error.line(), Some(2), "{error}");
    }

    #[test]
    fn a_missing_key_is_the_files_error() {
        let error = source("role = \"client\"\n").parse::<Sample>().unwrap_err();
        assert_eq!(error.to_string(), "client.toml: missing field `port`");
    }

    #[test]
    fn a_semantic_error_points_at_a_spanned_value() {
        let source = source("role = \"client\"\nport = 0 # any\n");
        let sample: Sample = source.parse().unwrap();
        let error = source.error_at(sample.port.span(), "port 0 cannot be used");
        assert_eq!(
            error.to_string(),
            "client.toml:2: port 0 cannot be used\n  |\n2 | port = 0 # any\n  |        ^"
        );
    }

    #[test]
    fn spans_outside_the_text_do_not_panic() {
        for span in [0..0, Range { start: 3, end: 2 }, 100..200, 1..usize::MAX, 8..9] {
            let _ = source("ääää\nö").error_at(span, "x").to_string();
        }
        let _ = source("").error_at(0..1, "x").to_string();
    }

    #[test]
    fn role_is_read_whatever_else_the_file_holds() {
        assert_eq!(role_of(&source("anything = 1\nrole = \"server\"\n[x]\n")), Ok(Role::Server));
        let error = role_of(&source("\nrole = \"sever\"\n")).unwrap_err();
        assert_eq!(error.line(), Some(2));
        assert!(error.to_string().contains("\"server\""), "{error}");
        assert_eq!(role_of(&source("x = 1\n")).unwrap_err().line(), None);
    }

    #[test]
    fn the_file_of_another_role_is_refused_whatever_else_it_holds() {
        let source = source("anything = 1\nrole = \"server\"\n[x]\n");
        assert_eq!(expect_role(&source, Role::Server), Ok(()));
        let error = expect_role(&source, Role::Client).unwrap_err();
        assert_eq!(
            (error.line(), error.message()),
            (Some(2), "this is the file of a server, not of a client")
        );
    }

    #[test]
    fn unreadable_files_are_explained() {
        let missing = load::<Sample>("/nonexistent/client.toml").unwrap_err();
        assert!(missing.to_string().starts_with("/nonexistent/client.toml: cannot read it: No such file"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("latin1.toml");
        std::fs::write(&path, b"role = \"client\"\nname = \"\xe4\"\n").unwrap();
        assert_eq!(load::<Sample>(&path).unwrap_err().line(), Some(2));
    }
}
