//! Results on standard output, for people or for programs; everything else goes to standard error.

use std::fmt::Display;
use std::io::{self, Write};
use std::str::FromStr;

use serde::Serialize;

/// How a result is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Words and tables; may change between releases.
    #[default]
    Human,
    /// One JSON object or JSON lines; documented and stable.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            other => Err(format!("`{other}` is no format: use human or json")),
        }
    }
}

/// The one writer of results.
#[derive(Debug)]
pub struct Output<W> {
    format: Format,
    writer: W,
}

impl<W: Write> Output<W> {
    /// Prints to `writer` in `format`.
    pub fn new(format: Format, writer: W) -> Self {
        Self { format, writer }
    }

    /// The chosen format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Prints one result: `human` for people, `value` as one line of JSON for programs. A reader that has seen enough, such as `head`, is no error.
    ///
    /// # Errors
    /// When the writer fails, for example because the disk is full.
    pub fn result<T: Serialize>(&mut self, value: &T, human: impl Display) -> io::Result<()> {
        let written = match self.format {
            Format::Human => writeln!(self.writer, "{human}"),
            Format::Json => serde_json::to_writer(&mut self.writer, value)
                .map_err(io::Error::from)
                .and_then(|()| writeln!(self.writer)),
        };
        enough(written.and_then(|()| self.writer.flush()))
    }

    /// Gives the writer back.
    pub fn into_inner(self) -> W {
        self.writer
    }
}

/// A pipe whose reader went away has taken what it wanted.
fn enough(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// A table for people: columns as wide as their widest cell, numbers to the right.
///
/// Rows shorter than the header are filled with empty cells, longer ones are cut.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let columns = header.len();
    let cell = |row: &[String], column: usize| row.get(column).cloned().unwrap_or_default();
    let width = |column: usize| {
        let widest = rows
            .iter()
            .map(|row| cell(row, column).chars().count())
            .max()
            .unwrap_or(0);
        widest.max(header[column].chars().count())
    };
    let numeric = |column: usize| {
        let starts_with_digit = |text: String| {
            text.is_empty()
                || text == "-"
                || text.starts_with(|c: char| c.is_ascii_digit() || c == '-' || c == '+')
        };
        !rows.is_empty() && rows.iter().all(|row| starts_with_digit(cell(row, column)))
    };
    let line = |cells: Vec<String>| {
        let padded: Vec<String> = cells
            .into_iter()
            .enumerate()
            .map(|(column, text)| {
                let fill = " ".repeat(width(column).saturating_sub(text.chars().count()));
                if numeric(column) {
                    format!("{fill}{text}")
                } else {
                    format!("{text}{fill}")
                }
            })
            .collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(header.iter().map(|&name| name.to_owned()).collect())];
    lines.push(
        (0..columns)
            .map(|column| "─".repeat(width(column)))
            .collect::<Vec<_>>()
            .join("  "),
    );
    lines.extend(
        rows.iter()
            .map(|row| line((0..columns).map(|column| cell(row, column)).collect())),
    );
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_one_json_line_or_words() {
        let value = serde_json::json!({ "spent": 1.5 });
        let print = |format| {
            let mut output = Output::new(format, Vec::new());
            output.result(&value, "spent 1.5").unwrap();
            String::from_utf8(output.into_inner()).unwrap()
        };
        assert_eq!(print(Format::Json), "{\"spent\":1.5}\n");
        assert_eq!(print(Format::Human), "spent 1.5\n");
    }

    #[test]
    fn aligns_words_left_and_numbers_right() {
        let rows = vec![
            vec!["kill".into(), "1.2 s".into()],
            vec!["a hang".into(), "10.0 s".into()],
        ];
        assert_eq!(
            table(&["fault", "healed"], &rows),
            "fault   healed\n──────  ──────\nkill     1.2 s\na hang  10.0 s"
        );
    }
}
