//! A TOML file, then the environment, into one structure. `check-config` and `run` call exactly this.
//!
//! Order: defaults of the structure, the file, then `PREFIX__SECTION__KEY` from the environment; flags come last
//! and are the caller's. A key that the structure does not know is refused, with the nearest known one.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// Why settings could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{path} is not valid TOML:\n{reason}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, column and the reason.
        reason: String,
    },
    /// A key is unknown or a value has the wrong type.
    #[error("{origin}: {reason}")]
    Value {
        /// Where the settings came from.
        origin: String,
        /// The key, the value and the reason.
        reason: String,
        /// The nearest known key, when one is near.
        suggestion: Option<String>,
    },
    /// An environment variable of ours names no place in the settings.
    #[error("environment variable {name} {reason}")]
    Environment {
        /// The variable.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl SettingsError {
    /// What to do next.
    pub fn hint(&self) -> String {
        match self {
            Self::Read { .. } => {
                "check the path and its permissions, or leave the option out to use the defaults".into()
            }
            Self::Syntax { .. } => {
                "correct the marked place; `check-config` shows the result without starting anything".into()
            }
            Self::Value {
                suggestion: Some(key),
                ..
            } => format!("did you mean `{key}`?"),
            Self::Value { suggestion: None, .. } => {
                "the configuration reference lists every key with unit, default and range".into()
            }
            Self::Environment { .. } => {
                "use PREFIX__SECTION__KEY, for example THERIAC__SAMPLING__INTERVAL=1s, or unset it".into()
            }
        }
    }
}

/// Loads settings from `file` (or only defaults when there is none) and from `environment` variables named
/// `PREFIX__SECTION__KEY` in upper case.
///
/// # Errors
/// [`SettingsError`] names the file, the key and, for a misspelt key, the nearest known one.
pub fn load<T: DeserializeOwned>(
    file: Option<&Path>,
    prefix: &str,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<T, SettingsError> {
    let text = match file {
        Some(path) => std::fs::read_to_string(path).map_err(|source| SettingsError::Read {
            path: path.to_owned(),
            source,
        })?,
        None => String::new(),
    };
    let origin = file.map_or_else(
        || "defaults and environment".to_owned(),
        |path| path.display().to_string(),
    );
    let mut overrides: Vec<(String, String)> = environment
        .into_iter()
        .filter(|(name, _)| name.starts_with(&format!("{prefix}__")))
        .collect();
    overrides.sort();
    // Without overrides the text itself is parsed, so that an error shows its line.
    if overrides.is_empty() {
        return parse(&text, &origin, file);
    }
    let mut table: Table = parse_table(&text, file)?;
    for (name, value) in overrides {
        set(&mut table, &name, prefix, &value)?;
    }
    Value::Table(table)
        .try_into()
        .map_err(|error: toml::de::Error| value_error(&origin, &error))
}

/// Parses a text that was read already; `file` is named in errors.
///
/// # Errors
/// [`SettingsError`] as for [`load`].
pub fn parse_text<T: DeserializeOwned>(text: &str, file: &Path) -> Result<T, SettingsError> {
    parse(text, &file.display().to_string(), Some(file))
}

fn parse<T: DeserializeOwned>(text: &str, origin: &str, file: Option<&Path>) -> Result<T, SettingsError> {
    // Syntax first: a broken file and a wrong key are different mistakes and get different help.
    parse_table(text, file)?;
    toml::from_str(text).map_err(|error| value_error(origin, &error))
}

fn parse_table(text: &str, file: Option<&Path>) -> Result<Table, SettingsError> {
    text.parse()
        .map_err(|error: toml::de::Error| SettingsError::Syntax {
            path: file.unwrap_or(Path::new("settings")).to_owned(),
            reason: error.to_string(),
        })
}

fn value_error(origin: &str, error: &toml::de::Error) -> SettingsError {
    SettingsError::Value {
        origin: origin.to_owned(),
        suggestion: nearest(error.message()),
        reason: error.to_string().trim_end().to_owned(),
    }
}

/// The nearest of the expected fields in serde's "unknown field `a`, expected one of `b`, `c`".
fn nearest(message: &str) -> Option<String> {
    let mut quoted = message
        .strip_prefix("unknown field ")?
        .split('`')
        .skip(1)
        .step_by(2);
    let unknown = quoted.next()?;
    quoted
        .map(|known| (strsim::damerau_levenshtein(unknown, known), known))
        .min()
        .filter(|(distance, known)| *distance <= known.len().max(unknown.len()) / 2)
        .map(|(_, known)| known.to_owned())
}

fn set(table: &mut Table, name: &str, prefix: &str, value: &str) -> Result<(), SettingsError> {
    let wrong = |reason: &str| SettingsError::Environment {
        name: name.to_owned(),
        reason: reason.to_owned(),
    };
    let path: Vec<String> = name[prefix.len() + 2..]
        .split("__")
        .map(str::to_lowercase)
        .collect();
    let Some((key, sections)) = path.split_last() else {
        return Err(wrong("names no key"));
    };
    if path.iter().any(String::is_empty) {
        return Err(wrong("has an empty part in its name"));
    }
    let mut table = table;
    for section in sections {
        table = table
            .entry(section.clone())
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .ok_or_else(|| wrong("goes through a key that is not a section"))?;
    }
    table.insert(key.clone(), scalar(value));
    Ok(())
}

/// A TOML value when the text is one (`3`, `true`, `["a"]`), else the text itself.
fn scalar(text: &str) -> Value {
    let parsed: Option<Table> = format!("value = {text}").parse().ok();
    parsed
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

/// For `#[serde(with = "theriac_command::settings::duration")]`: a span as text such as `500ms`, `1s` or `2m`.
pub mod duration {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer};

    /// Writes a span as text.
    ///
    /// # Errors
    /// Only those of the serializer.
    pub fn serialize<S: Serializer>(span: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*span))
    }

    /// Reads a span from text.
    ///
    /// # Errors
    /// When the text is no span; the message shows the form.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text).map_err(|error| {
            serde::de::Error::custom(format!(
                "`{text}` is no duration such as \"500ms\", \"1s\" or \"2m\": {error}"
            ))
        })
    }
}

/// As [`duration`], for a key that may be absent.
pub mod optional_duration {
    use std::time::Duration;

    use serde::{Deserializer, Serializer};

    /// Writes a span as text, or nothing.
    ///
    /// # Errors
    /// Only those of the serializer.
    pub fn serialize<S: Serializer>(span: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        match span {
            Some(span) => super::duration::serialize(span, serializer),
            None => serializer.serialize_none(),
        }
    }

    /// Reads a span from text.
    ///
    /// # Errors
    /// When the text is no span; the message shows the form.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        super::duration::deserialize(deserializer).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq, Default)]
    #[serde(deny_unknown_fields, default)]
    struct Example {
        name: String,
        sampling: Sampling,
    }

    #[derive(Debug, Deserialize, PartialEq, Default)]
    #[serde(deny_unknown_fields, default)]
    struct Sampling {
        #[serde(with = "duration")]
        interval: Duration,
        rows: u32,
    }

    fn load_text(text: &str, environment: &[(&str, &str)]) -> Result<Example, SettingsError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("edge.toml");
        std::fs::write(&path, text).unwrap();
        load(
            Some(&path),
            "THERIAC",
            environment
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned())),
        )
    }

    #[test]
    fn environment_overrides_file() {
        let text = "name = 'a'\n[sampling]\ninterval = '1s'\nrows = 2\n";
        let environment = [
            ("THERIAC__SAMPLING__INTERVAL", "250ms"),
            ("THERIAC__SAMPLING__ROWS", "9"),
            ("HOME", "/"),
        ];
        let loaded = load_text(text, &environment).unwrap();
        assert_eq!(
            loaded.sampling,
            Sampling {
                interval: Duration::from_millis(250),
                rows: 9
            }
        );
        assert_eq!(loaded.name, "a");
    }

    #[test]
    fn misspelt_key_is_refused_with_the_nearest_known_one() {
        let error = load_text("[sampling]\nintervall = '1s'\n", &[]).unwrap_err();
        assert_eq!(error.hint(), "did you mean `interval`?");
        assert!(error.to_string().contains("intervall"), "{error}");
        let error = load_text("", &[("THERIAC__SAMPLING__ROWSS", "1")]).unwrap_err();
        assert_eq!(error.hint(), "did you mean `rows`?");
    }

    #[test]
    fn wrong_values_and_syntax_name_the_place() {
        let error = load_text("[sampling]\ninterval = '1 parsec'\n", &[]).unwrap_err();
        assert!(
            error.to_string().contains("1 parsec") && error.to_string().contains("line 2"),
            "{error}"
        );
        assert!(matches!(
            load_text("name = ", &[]).unwrap_err(),
            SettingsError::Syntax { .. }
        ));
        let error = load_text("name = 'a'", &[("THERIAC__NAME__X", "1")]).unwrap_err();
        assert!(matches!(error, SettingsError::Environment { .. }), "{error}");
    }

    #[test]
    fn missing_file_is_named_and_no_file_is_fine() {
        let error = load::<Example>(Some(Path::new("/nowhere/edge.toml")), "THERIAC", []).unwrap_err();
        assert!(error.to_string().contains("/nowhere/edge.toml"));
        assert_eq!(load::<Example>(None, "THERIAC", []).unwrap(), Example::default());
    }
}
